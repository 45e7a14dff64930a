// Instantiates the kernels that pack experts.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/pack_kernels.h"

#define TDC_PACK_KERNEL(X, name, element) \
  TDC_KERNEL(name, 256, tdc::PackParams) { tdc::pack_experts<element>(p); }
TDC_PACK_ELEMENTS(TDC_PACK_KERNEL, )
#undef TDC_PACK_KERNEL
