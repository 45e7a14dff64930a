// The kernels that pack experts, by the size of an element: X(name, threads, Params).
#pragma once

#include "cuda/pack_params.h"

// ROW(X, name, element)
#define TDC_PACK_ELEMENTS(ROW, X)            \
  ROW(X, tdc_pack_experts_2, unsigned short) \
  ROW(X, tdc_pack_experts_4, unsigned)       \
  ROW(X, tdc_pack_experts_8, unsigned long long)

#define TDC_PACK_ROW(X, name, element) X(name, 256, tdc::PackParams)
#define TDC_PACK_KERNELS(X) TDC_PACK_ELEMENTS(TDC_PACK_ROW, X)
