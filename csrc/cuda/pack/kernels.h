// The kernels that pack experts, by the size of an element in bytes: X(name, Params, (function), threads).
#pragma once

#include "cuda/pack/params.h"

#define TDC_KERNELS_pack(X)                                                        \
  X(tdc_pack_experts_2, tdc::PackParams, (tdc::pack_experts<unsigned short>), 256) \
  X(tdc_pack_experts_4, tdc::PackParams, (tdc::pack_experts<unsigned>), 256)       \
  X(tdc_pack_experts_8, tdc::PackParams, (tdc::pack_experts<unsigned long long>), 256)
