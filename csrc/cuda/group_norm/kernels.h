// The kernels of group norm: X(name, Params, (function), threads).
#pragma once

#include "cuda/group_norm/params.h"

#define TDC_GROUP_NORM_BOUND(X, name, function, T, vector, two, stage, ...) \
  X(name, tdc::GroupNormParams, (tdc::function<T, vector, two, tdc::NormStage::stage>), __VA_ARGS__)
#define TDC_GROUP_NORM_STAGE(X, name, function, T, vector, two, stage) \
  TDC_GROUP_NORM_BOUND(X, name, function, T, vector, two, stage, 512)

// Two blocks of the launch that writes y fit an SM at 64 registers, which is one too few for sm_100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define TDC_GROUP_NORM_APPLY_BOUNDS 512, 1
#else
#define TDC_GROUP_NORM_APPLY_BOUNDS 512
#endif

// `vector` channels per access: 16 bytes of them, or one where alignment forbids that. `two`: x and x2. Last come the
// launch bounds of the backward that writes dx: with one block per SM the compiler takes registers where it would spill
// them.
#define TDC_GROUP_NORM_WHOLE(X, suffix, T, vector, two, ...)                                                   \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_whole_##suffix, group_norm_forward, T, vector, two, kWhole)           \
  TDC_GROUP_NORM_BOUND(X, tdc_group_norm_backward_whole_##suffix, group_norm_backward, T, vector, two, kWhole, \
                       __VA_ARGS__)
#define TDC_GROUP_NORM_SPLIT(X, suffix, T, vector, two, ...)                                                       \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_partial_##suffix, group_norm_forward, T, vector, two, kPartial)           \
  TDC_GROUP_NORM_BOUND(X, tdc_group_norm_apply_##suffix, group_norm_forward, T, vector, two, kApply,               \
                       TDC_GROUP_NORM_APPLY_BOUNDS)                                                                \
  TDC_GROUP_NORM_STAGE(X, tdc_group_norm_backward_partial_##suffix, group_norm_backward, T, vector, two, kPartial) \
  TDC_GROUP_NORM_BOUND(X, tdc_group_norm_backward_apply_##suffix, group_norm_backward, T, vector, two, kApply,     \
                       __VA_ARGS__)
#define TDC_GROUP_NORM_STREAM(X, suffix, T, vector, two)                                                              \
  X(tdc_group_norm_stream_##suffix, tdc::GroupNormParams, (tdc::group_norm_stream<T, vector, two>), 512, 2)           \
  X(tdc_group_norm_backward_stream_##suffix, tdc::GroupNormParams, (tdc::group_norm_backward_stream<T, vector, two>), \
    512, 1)
// The last bound: blocks of a cluster, kNormCluster of split.h.
#define TDC_GROUP_NORM_CLUSTER(X, suffix, T, vector, two)                                                        \
  X(tdc_group_norm_cluster_##suffix, tdc::GroupNormParams, (tdc::group_norm_cluster<T, vector, two>), 512, 2, 4) \
  X(tdc_group_norm_backward_cluster_##suffix, tdc::GroupNormParams,                                              \
    (tdc::group_norm_backward_cluster<T, vector, two>), 512, 1, 4)
#define TDC_GROUP_NORM_EXPERT_SUMS(X, suffix, T) \
  X(tdc_group_norm_expert_sums_##suffix, tdc::GroupNormParams, (tdc::group_norm_expert_sums<T>), 512)

#define TDC_KERNELS_group_norm(X)                                   \
  TDC_GROUP_NORM_WHOLE(X, fp32_vector, float, 4, false, 512, 1)     \
  TDC_GROUP_NORM_WHOLE(X, bf16_vector, tdc::bf16, 8, false, 512)    \
  TDC_GROUP_NORM_WHOLE(X, fp16_vector, tdc::half, 8, false, 512)    \
  TDC_GROUP_NORM_SPLIT(X, fp32_vector, float, 4, false, 512, 1)     \
  TDC_GROUP_NORM_SPLIT(X, bf16_vector, tdc::bf16, 8, false, 512)    \
  TDC_GROUP_NORM_SPLIT(X, fp16_vector, tdc::half, 8, false, 512)    \
  TDC_GROUP_NORM_SPLIT(X, fp32_scalar, float, 1, false, 512, 1)     \
  TDC_GROUP_NORM_SPLIT(X, bf16_scalar, tdc::bf16, 1, false, 512, 1) \
  TDC_GROUP_NORM_SPLIT(X, fp16_scalar, tdc::half, 1, false, 512, 1) \
  TDC_GROUP_NORM_EXPERT_SUMS(X, fp32, float)                        \
  TDC_GROUP_NORM_EXPERT_SUMS(X, bf16, tdc::bf16)                    \
  TDC_GROUP_NORM_EXPERT_SUMS(X, fp16, tdc::half)

// A family of its own, which NVRTC compiles where a model has such norms.
#define TDC_KERNELS_group_norm_two(X)                                  \
  TDC_GROUP_NORM_WHOLE(X, fp32_vector_two, float, 4, true, 512, 1)     \
  TDC_GROUP_NORM_WHOLE(X, bf16_vector_two, tdc::bf16, 8, true, 512)    \
  TDC_GROUP_NORM_WHOLE(X, fp16_vector_two, tdc::half, 8, true, 512)    \
  TDC_GROUP_NORM_SPLIT(X, fp32_vector_two, float, 4, true, 512, 1)     \
  TDC_GROUP_NORM_SPLIT(X, bf16_vector_two, tdc::bf16, 8, true, 512)    \
  TDC_GROUP_NORM_SPLIT(X, fp16_vector_two, tdc::half, 8, true, 512)    \
  TDC_GROUP_NORM_SPLIT(X, fp32_scalar_two, float, 1, true, 512, 1)     \
  TDC_GROUP_NORM_SPLIT(X, bf16_scalar_two, tdc::bf16, 1, true, 512, 1) \
  TDC_GROUP_NORM_SPLIT(X, fp16_scalar_two, tdc::half, 1, true, 512, 1)

// Another, for the `hopper` backend, see stream.cuh.
#define TDC_KERNELS_group_norm_stream(X)                        \
  TDC_GROUP_NORM_STREAM(X, fp32_vector, float, 4, false)        \
  TDC_GROUP_NORM_STREAM(X, bf16_vector, tdc::bf16, 8, false)    \
  TDC_GROUP_NORM_STREAM(X, fp16_vector, tdc::half, 8, false)    \
  TDC_GROUP_NORM_STREAM(X, fp32_vector_two, float, 4, true)     \
  TDC_GROUP_NORM_STREAM(X, bf16_vector_two, tdc::bf16, 8, true) \
  TDC_GROUP_NORM_STREAM(X, fp16_vector_two, tdc::half, 8, true)

// And for clusters, see cluster.cuh.
#define TDC_KERNELS_group_norm_cluster(X)                        \
  TDC_GROUP_NORM_CLUSTER(X, fp32_vector, float, 4, false)        \
  TDC_GROUP_NORM_CLUSTER(X, bf16_vector, tdc::bf16, 8, false)    \
  TDC_GROUP_NORM_CLUSTER(X, fp16_vector, tdc::half, 8, false)    \
  TDC_GROUP_NORM_CLUSTER(X, fp32_vector_two, float, 4, true)     \
  TDC_GROUP_NORM_CLUSTER(X, bf16_vector_two, tdc::bf16, 8, true) \
  TDC_GROUP_NORM_CLUSTER(X, fp16_vector_two, tdc::half, 8, true)
