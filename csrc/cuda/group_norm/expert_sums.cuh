// dweight and dbias of every expert: the sums of the samples' terms over all groups that use the expert. Block (x, e)
// takes 32 channels of expert e; warp r adds samples r, r + warps, ... of each group, group after group, and the warps'
// sums are added in a fixed order, so every run gives the same bits.
#pragma once

#include "cuda/group_norm/block.cuh"

namespace tdc {

template <class T>
__device__ __forceinline__ void group_norm_expert_sums(const GroupNormParams& p) {
  TDC_SHARED(float, sums, 2 * kNormThreads);
  const int lane = threadIdx.x % kNormWarp, warp = threadIdx.x / kNormWarp, warps = blockDim.x / kNormWarp;
  const int channel = blockIdx.x * kNormWarp + lane, expert = blockIdx.y;
  float dweight = 0, dbias = 0;
  for (int base = 0; base < p.num_groups; base += kNormWarp) {
    const int candidate = base + lane;
    unsigned users = ballot(candidate < p.num_groups && p.weight_index[min(candidate, p.num_groups - 1)] == expert);
    for (; users; users &= users - 1) {
      const int group = base + __ffs(static_cast<int>(users)) - 1;
      const int width = p.widths ? p.widths[group] : p.channels;
      const int live = min(width, p.channels) / p.channels_per_group * p.channels_per_group;
      const int end = min(p.offsets[group + 1], p.batch);
      if (channel >= live) continue;
#pragma unroll 4
      for (int sample = max(p.offsets[group], 0) + warp; sample < end; sample += warps) {
        const long long at = static_cast<long long>(sample) * p.channels + channel;
        if (p.dweight_share) dweight += p.dweight_share[at];
        if (p.dbias_share) dbias += p.dbias_share[at];
      }
    }
  }
  sums[threadIdx.x] = dweight;
  sums[kNormThreads + threadIdx.x] = dbias;
  block_sync();
  if (warp > 0 || channel >= p.channels) return;
  for (int other = 1; other < warps; ++other) {
    dweight += sums[other * kNormWarp + lane];
    dbias += sums[kNormThreads + other * kNormWarp + lane];
  }
  const long long at = static_cast<long long>(expert) * p.channels + channel;
  if (p.dweight) static_cast<T*>(p.dweight)[at] = from_float<T>(dweight);
  if (p.dbias) static_cast<T*>(p.dbias)[at] = from_float<T>(dbias);
}

}  // namespace tdc
