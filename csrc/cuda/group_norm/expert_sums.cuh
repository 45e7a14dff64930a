// dweight and dbias of every expert: the sums of the samples' terms over all groups that use the expert, always in the
// same order, so every run gives the same bits.
//
//   in backward itself  where samples are few: the block of an expert and a chunk of channels that is the last to write
//                       its sample's terms adds up those of all samples
//   as a launch         else. Block (x, e) takes 32 channels of expert e; warp r adds samples r, r + warps, ... of each
//                       group, group after group, and the warps' sums are added in a fixed order
#pragma once

#include "cuda/group_norm/block.cuh"

namespace tdc {

// Calls add(first sample, past the last, live channels) for every group that uses the expert. A whole warp calls it.
template <class Add>
__device__ __forceinline__ void for_groups_of_expert(const GroupNormParams& p, int expert, const Add& add) {
  for (int base = 0; base < p.num_groups; base += kNormWarp) {
    const int candidate = base + static_cast<int>(threadIdx.x) % kNormWarp;
    const int used = clamped(p.weight_index[min(candidate, p.num_groups - 1)], 0, p.num_experts - 1);
    unsigned users = ballot(candidate < p.num_groups && used == expert);
    for (; users; users &= users - 1) {
      const int group = base + __ffs(static_cast<int>(users)) - 1;
      const int width = p.widths ? p.widths[group] : p.channels;
      const int live = min(width, p.channels) / p.channels_per_group * p.channels_per_group;
      add(max(p.offsets[group], 0), min(p.offsets[group + 1], p.batch), live);
    }
  }
}

__device__ __forceinline__ int samples_of_expert(const GroupNormParams& p, int expert) {
  int samples = 0;
  for_groups_of_expert(p, expert, [&](int first, int past, int) { samples += max(past - first, 0); });
  return samples;
}

// One warp adds up `share` over the samples of an expert: `columns` channels from `channel` on, a power of two of at
// most 32, those before `end`. The result is that of channel + lane % columns.
__device__ __forceinline__ float sum_of_samples(const GroupNormParams& p, const float* share, int expert, int channel,
                                                int columns, int end) {
  const int lane = threadIdx.x % kNormWarp, own = channel + lane % columns, rows = kNormWarp / columns;
  float sum = 0;
  for_groups_of_expert(p, expert, [&](int first, int past, int live) {
    if (own >= min(live, end)) return;
#pragma unroll 8
    for (int sample = first + lane / columns; sample < past; sample += rows) {
      sum += share[static_cast<long long>(sample) * p.channels + own];
    }
  });
  for (int distance = kNormWarp / 2; distance >= columns; distance /= 2) sum += shfl_xor(sum, distance);
  return sum;
}

// Exact zeros for the block's chunk of experts that no sample uses. Blocks share the experts by their samples.
template <class T>
__device__ __forceinline__ void zero_unused_experts(const GroupNormParams& p, const NormBlock& block) {
  const int lane = threadIdx.x % kNormWarp, warp = threadIdx.x / kNormWarp, warps = blockDim.x / kNormWarp;
  for (long long expert = block.sample + static_cast<long long>(warp) * p.batch; expert < p.num_experts;
       expert += static_cast<long long>(warps) * p.batch) {
    if (samples_of_expert(p, static_cast<int>(expert)) > 0) continue;
    for (int c = lane; c < block.channels; c += kNormWarp) {
      const long long at = expert * p.channels + block.first_channel + c;
      if (p.dweight) static_cast<T*>(p.dweight)[at] = from_float<T>(0.0f);
      if (p.dbias) static_cast<T*>(p.dbias)[at] = from_float<T>(0.0f);
    }
  }
}

// Counts the blocks of one expert and chunk that have written their sample's terms.
struct ExpertArrival {
  int samples = 0;  // of the first warp: those of the expert, a block for each
  int arrived = 0;  // of thread 0: blocks before this one

  // Where waiting for memory is hidden by waiting for x. All threads call it.
  __device__ __forceinline__ void count(const GroupNormParams& p, const NormBlock& block) {
    if (threadIdx.x < kNormWarp) samples = samples_of_expert(p, block.expert);
  }

  // After a barrier behind the terms. What follows hides the latency of the counter.
  __device__ __forceinline__ void arrive(const GroupNormParams& p, const NormBlock& block) {
    if (threadIdx.x != 0) return;
    if (!TDC_PLANTED(NORM_NO_RELEASE)) device_fence();
    arrived = atomic_add_int(counter(p, block), 1);
  }

  // The last block of the expert adds up the terms and leaves the counter as it was. All threads call it.
  template <class T>
  __device__ __forceinline__ void finish(const GroupNormParams& p, const NormBlock& block) const {
    TDC_SHARED(int, last, 1);
    if (threadIdx.x == 0) {
      last[0] = arrived == samples - (TDC_PLANTED(NORM_SUMS_TOO_EARLY) ? 2 : 1);
      if (last[0] && !TDC_PLANTED(NORM_KEEPS_COUNTER)) atomic_add_int(counter(p, block), -samples);
      if (!TDC_PLANTED(NORM_NO_ACQUIRE)) device_fence();
    }
    block_sync();
    if (!last[0]) return;
    int columns = kNormWarp;
    while (columns / 2 >= block.channels) columns /= 2;
    const int lane = threadIdx.x % kNormWarp, strips = (block.channels + columns - 1) / columns;
    for (int task = threadIdx.x / kNormWarp; task < 2 * strips; task += blockDim.x / kNormWarp) {
      const int first = block.first_channel + task / 2 * columns, end = block.first_channel + block.channels;
      const float* share = task % 2 ? p.dbias_share : p.dweight_share;
      T* sums = static_cast<T*>(task % 2 ? p.dbias : p.dweight);
      if (!share) continue;
      const float sum = sum_of_samples(p, share, block.expert, first, columns, end);
      if (lane >= columns || first + lane >= end) continue;
      sums[static_cast<long long>(block.expert) * p.channels + first + lane] = from_float<T>(sum);
    }
  }

 private:
  static __device__ __forceinline__ int* counter(const GroupNormParams& p, const NormBlock& block) {
    return p.counters + static_cast<long long>(block.expert) * p.chunks + block.first_channel / p.chunk_channels;
  }
};

template <class T>
__device__ __forceinline__ void group_norm_expert_sums(const GroupNormParams& p) {
  TDC_SHARED(float, sums, 2 * kNormThreads);
  const int lane = threadIdx.x % kNormWarp, warp = threadIdx.x / kNormWarp, warps = blockDim.x / kNormWarp;
  const int channel = blockIdx.x * kNormWarp + lane, expert = blockIdx.y;
  float dweight = 0, dbias = 0;
  for_groups_of_expert(p, expert, [&](int first, int past, int live) {
    if (channel >= live) return;
#pragma unroll 4
    for (int sample = first + warp; sample < past; sample += warps) {
      const long long at = static_cast<long long>(sample) * p.channels + channel;
      if (p.dweight_share) dweight += p.dweight_share[at];
      if (p.dbias_share) dbias += p.dbias_share[at];
    }
  });
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
