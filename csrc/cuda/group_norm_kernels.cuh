// Instantiates the group norm kernels.
#pragma once

#include "cuda/group_norm_backward.cuh"
#include "cuda/group_norm_expert_sums.cuh"
#include "cuda/group_norm_forward.cuh"
#include "cuda/group_norm_kernels.h"

#define TDC_GROUP_NORM_STAGE(X, name, function, dtype, vector, stage) \
  TDC_KERNEL(name, 512, tdc::GroupNormParams) { function<dtype, vector, tdc::NormStage::stage>(p); }
TDC_GROUP_NORM_STAGES(TDC_GROUP_NORM_STAGE, )
#undef TDC_GROUP_NORM_STAGE

#define TDC_GROUP_NORM_SUMS(X, name, dtype) \
  TDC_KERNEL(name, 512, tdc::GroupNormParams) { tdc::group_norm_expert_sums<dtype>(p); }
TDC_GROUP_NORM_EXPERT_SUMS(TDC_GROUP_NORM_SUMS, )
#undef TDC_GROUP_NORM_SUMS
