// The group norm kernels by name.
#pragma once

#include "cuda/group_norm_params.h"

// ROW(X, name, function, dtype, vector, stage): `vector` channels to an access of 16 bytes, one where alignment
// forbids.
#define TDC_GROUP_NORM_WHOLE(ROW, X, suffix, dtype, vector)                             \
  ROW(X, tdc_group_norm_whole_##suffix, tdc::group_norm_forward, dtype, vector, kWhole) \
  ROW(X, tdc_group_norm_backward_whole_##suffix, tdc::group_norm_backward, dtype, vector, kWhole)
#define TDC_GROUP_NORM_SPLIT(ROW, X, suffix, dtype, vector)                                           \
  ROW(X, tdc_group_norm_partial_##suffix, tdc::group_norm_forward, dtype, vector, kPartial)           \
  ROW(X, tdc_group_norm_apply_##suffix, tdc::group_norm_forward, dtype, vector, kApply)               \
  ROW(X, tdc_group_norm_backward_partial_##suffix, tdc::group_norm_backward, dtype, vector, kPartial) \
  ROW(X, tdc_group_norm_backward_apply_##suffix, tdc::group_norm_backward, dtype, vector, kApply)
#define TDC_GROUP_NORM_STAGES(ROW, X)                     \
  TDC_GROUP_NORM_WHOLE(ROW, X, fp32_vector, float, 4)     \
  TDC_GROUP_NORM_WHOLE(ROW, X, bf16_vector, tdc::bf16, 8) \
  TDC_GROUP_NORM_WHOLE(ROW, X, fp16_vector, tdc::half, 8) \
  TDC_GROUP_NORM_SPLIT(ROW, X, fp32_vector, float, 4)     \
  TDC_GROUP_NORM_SPLIT(ROW, X, bf16_vector, tdc::bf16, 8) \
  TDC_GROUP_NORM_SPLIT(ROW, X, fp16_vector, tdc::half, 8) \
  TDC_GROUP_NORM_SPLIT(ROW, X, fp32_scalar, float, 1)     \
  TDC_GROUP_NORM_SPLIT(ROW, X, bf16_scalar, tdc::bf16, 1) \
  TDC_GROUP_NORM_SPLIT(ROW, X, fp16_scalar, tdc::half, 1)

// ROW(X, name, dtype)
#define TDC_GROUP_NORM_EXPERT_SUMS(ROW, X)           \
  ROW(X, tdc_group_norm_expert_sums_fp32, float)     \
  ROW(X, tdc_group_norm_expert_sums_bf16, tdc::bf16) \
  ROW(X, tdc_group_norm_expert_sums_fp16, tdc::half)

// X(name, threads, Params)
#define TDC_GROUP_NORM_ROW(X, name, ...) X(name, 512, tdc::GroupNormParams)
#define TDC_GROUP_NORM_KERNELS(X)              \
  TDC_GROUP_NORM_STAGES(TDC_GROUP_NORM_ROW, X) \
  TDC_GROUP_NORM_EXPERT_SUMS(TDC_GROUP_NORM_ROW, X)
