// Group norm by clusters, for images of which even a single norm group does not fit beside another block's. The blocks
// of a cluster have a run of pixels each of one (sample, chunk), which stays in shared memory, and read each other's
// sums:
//
//   copies            | my run of x, in backward of x and dy: all at once, 16 bytes each, straight to shared memory
//   sums of my run           |
//   barrier of the cluster      |
//   sums of all runs, read from the other blocks' shared memory in the order of ranks: the same in every block
//   results                           | from shared memory
//   barrier of the cluster                      | nobody ends before all have read its sums
//
// So x is read once and y written once, by rows of several norm groups: those of one alone would be shorter than what
// memory delivers. The second barrier is waited for at the end, when all have long arrived.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/group_norm/stream.cuh"

namespace tdc {

// The moments of group g over the runs of all blocks of the cluster, of which `moments` are this one's.
__device__ __forceinline__ GroupMoments cluster_moments(const GroupNormParams& p, float* moments, int g) {
  return merged_moments(p, [&](int rank) { return cluster_shared(moments + g * kMomentFloats, rank); });
}

template <class T, int V, bool kTwo>
__device__ __forceinline__ void group_norm_cluster(const GroupNormParams& p) {
#ifdef TDC_SM90A
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  const NormBlock block = norm_block(p, blockIdx.x, blockIdx.y);
  const ForwardArrays arrays(p, shared);
  float* moments = arrays.base + p.chunk_channels;
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* tile = reinterpret_cast<T*>(shared + p.tile);
  const float count = static_cast<float>(block.pixels) * p.channels_per_group;

  ItemCopy<T, kTwo, false>(p, block, true, tile).template all<V>(thread);
  cp_async_commit();
  zero_counters(p);
  prefetch_coefficients<T>(p, block);
  cp_async_wait<0>();
  if (block.live > 0) {
    sum_item<T, V>(block, thread, tile, row_sums, arrays.multiplier);
    group_means(p, block, arrays.multiplier, arrays.centre, count);
    sum_centred<T, V>(block, thread, tile, row_sums, arrays.centre, arrays.multiplier, p.chunk_channels);
    for (int g = threadIdx.x / kNormWarp; g < block.live_groups; g += blockDim.x / kNormWarp) {
      const GroupMoments own = block_moments(p, arrays, g, count);
      if (threadIdx.x % kNormWarp == 0) put_moments(moments + g * kMomentFloats, own);
    }
  }
  if (!TDC_PLANTED(NORM_CLUSTER_READS_EARLY)) cluster_arrive(), cluster_wait();
  for (int g = threadIdx.x / kNormWarp; g < block.groups; g += blockDim.x / kNormWarp) {
    finish_group(p, block, arrays, g, g < block.live_groups ? cluster_moments(p, moments, g) : GroupMoments{0, 0, 0},
                 [&](int c) { return affine_of<T>(p, block, c); });
  }
  if (!TDC_PLANTED(NORM_CLUSTER_ENDS_EARLY)) cluster_arrive();
  if (!TDC_PLANTED(NORM_NO_COEFFICIENT_BARRIER)) block_sync();
  normalize<T, V, kTwo, true>(p, block, thread, arrays, tile);
  if (!TDC_PLANTED(NORM_CLUSTER_ENDS_EARLY)) cluster_wait();
#else
  trap();
#endif
}

template <class T, int V, bool kTwo>
__device__ __forceinline__ void group_norm_backward_cluster(const GroupNormParams& p) {
#ifdef TDC_SM90A
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  const NormBlock block = norm_block(p, blockIdx.x, blockIdx.y);
  const BackwardArrays arrays(p, shared);
  BackwardArrays own = arrays;  // with the sums of this block's run, which the others read
  own.sum_dz = arrays.sum_dz_centred + p.chunk_channels;
  own.sum_dz_centred = own.sum_dz + p.chunk_channels;
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* x_tile = reinterpret_cast<T*>(shared + p.tile);
  T* dy_tile = x_tile + block.pixels * block.channels;

  ItemCopy<T, kTwo, true>(p, block, true, x_tile).template all<V>(thread);
  cp_async_commit();
  const bool sums_experts = p.counters && blockIdx.y == 0;
  ExpertArrival arrival;
  if (sums_experts) arrival.count(p, block);
  backward_coefficients<T>(p, block, arrays);
  cp_async_wait<0>();
  if (block.live > 0) sum_item_grads<T, V>(p, block, thread, own, x_tile, dy_tile, row_sums);
  if (!TDC_PLANTED(NORM_CLUSTER_READS_EARLY)) cluster_arrive(), cluster_wait();
  merge_sums(p, block, arrays,
             [&](int rank, int which) { return cluster_shared(which ? own.sum_dz_centred : own.sum_dz, rank); });
  if (!TDC_PLANTED(NORM_CLUSTER_ENDS_EARLY)) cluster_arrive();
  finish_grads<T>(p, block, arrays);
  if (sums_experts) {
    zero_unused_experts<T>(p, block);
    arrival.arrive(p, block);
  }
  if (p.dx || kTwo) input_grads<T, V, kTwo, true>(p, block, thread, arrays, x_tile, dy_tile);
  if (sums_experts) arrival.finish<T>(p, block);
  if (!TDC_PLANTED(NORM_CLUSTER_ENDS_EARLY)) cluster_wait();
#else
  trap();
#endif
}

}  // namespace tdc
