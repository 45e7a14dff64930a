// The kernels of group norm: X(name, Params, (function), threads).
#pragma once

#include "cuda/group_norm/params.h"

#define TDC_GROUP_NORM_STAGE(X, name, function, T, vector, stage) \
  X(name, tdc::GroupNormParams, (tdc::function<T, vector, tdc::NormStage::stage>), 512)

// `vector` channels per access: 16 bytes of them, or one where alignment forbids that.
#define TDC_GROUP_NORM_WHOLE(X, suffix, T, vector)                                              \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_whole_##suffix, group_norm_forward, T, vector, kWhole) \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_backward_whole_##suffix, group_norm_backward, T, vector, kWhole)
#define TDC_GROUP_NORM_SPLIT(X, suffix, T, vector)                                                            \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_partial_##suffix, group_norm_forward, T, vector, kPartial)           \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_apply_##suffix, group_norm_forward, T, vector, kApply)               \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_backward_partial_##suffix, group_norm_backward, T, vector, kPartial) \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_backward_apply_##suffix, group_norm_backward, T, vector, kApply)
#define TDC_GROUP_NORM_EXPERT_SUMS(X, suffix, T) \
  X(tdc_group_norm_expert_sums_##suffix, tdc::GroupNormParams, (tdc::group_norm_expert_sums<T>), 512)

#define TDC_KERNELS_group_norm(X)                    \
  TDC_GROUP_NORM_WHOLE(X, fp32_vector, float, 4)     \
  TDC_GROUP_NORM_WHOLE(X, bf16_vector, tdc::bf16, 8) \
  TDC_GROUP_NORM_WHOLE(X, fp16_vector, tdc::half, 8) \
  TDC_GROUP_NORM_SPLIT(X, fp32_vector, float, 4)     \
  TDC_GROUP_NORM_SPLIT(X, bf16_vector, tdc::bf16, 8) \
  TDC_GROUP_NORM_SPLIT(X, fp16_vector, tdc::half, 8) \
  TDC_GROUP_NORM_SPLIT(X, fp32_scalar, float, 1)     \
  TDC_GROUP_NORM_SPLIT(X, bf16_scalar, tdc::bf16, 1) \
  TDC_GROUP_NORM_SPLIT(X, fp16_scalar, tdc::half, 1) \
  TDC_GROUP_NORM_EXPERT_SUMS(X, fp32, float)         \
  TDC_GROUP_NORM_EXPERT_SUMS(X, bf16, tdc::bf16)     \
  TDC_GROUP_NORM_EXPERT_SUMS(X, fp16, tdc::half)
