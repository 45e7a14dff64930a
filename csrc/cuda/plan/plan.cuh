// The routing plan in one block: a stable counting sort of the samples by group, and the tile tables of the sorted
// batch. Only integers are added, and every position follows from the sample's place in the batch, so the result does
// not depend on timing.
//
// Shared memory, in ints:
//   warp_sums  kTileLevels x 32       totals of each warp within a scan
//   offsets    num_groups + 1
//   counters   max(counting_warps, levels_per_pass) x num_groups: first the samples of each group in each warp's
//              slice of the batch, later the first tile of each group
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan/params.h"

namespace tdc {

constexpr int kWarp = 32;

// Sums of kTileLevels values over the threads before this one, all at once; `total` gets the sums over the block.
// Ends with a barrier, so that it may be called again.
__device__ __forceinline__ void exclusive_block_scan(int (&value)[kTileLevels], int (&total)[kTileLevels], int count,
                                                     int* warp_sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < kTileLevels; ++k) {
    if (k >= count) break;
    int sum = value[k];
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = shfl_up(sum, distance);
      if (lane >= distance) sum += before;
    }
    if (lane == kWarp - 1) warp_sums[k * kWarp + warp] = sum;
    value[k] = sum - value[k];
  }
  block_sync();
  for (int k = warp; k < count; k += warps) {  // one warp per value scans the totals of the warps
    int sum = lane < warps ? warp_sums[k * kWarp + lane] : 0;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int before = shfl_up(sum, distance);
      if (lane >= distance) sum += before;
    }
    warp_sums[k * kWarp + lane] = sum;
  }
  if (!TDC_PLANTED(PLAN_NO_SCAN_BARRIER)) block_sync();
#pragma unroll
  for (int k = 0; k < kTileLevels; ++k) {
    if (k >= count) break;
    if (warp > 0) value[k] += warp_sums[k * kWarp + warp - 1];
    total[k] = warp_sums[k * kWarp + kWarp - 1];
  }
  block_sync();
}

struct SliceOfBatch {
  int begin, end;  // begin is a multiple of the warp's width, so that a warp's trip count is the same in all lanes
};

__device__ __forceinline__ SliceOfBatch slice_of_warp(const RoutingPlanParams& p) {
  const int warp = threadIdx.x / kWarp, steps = (p.batch + kWarp - 1) / kWarp;
  if (warp >= p.counting_warps) return {0, 0};
  const int per_warp = (steps + p.counting_warps - 1) / p.counting_warps * kWarp;
  const int begin = min(p.batch, warp * per_warp);
  return {begin, min(p.batch, begin + per_warp)};
}

// Rows kept for the tiles of at most 2^level samples: at least the sum over groups of ceil(samples / 2^level).
__device__ __forceinline__ int tile_rows(const RoutingPlanParams& p, int level) {
  return min(p.batch, (p.batch >> level) + min(p.num_groups, p.batch));
}

// A group id, checked before it is used as an index: a wrong one stops the kernel with an error.
__device__ __forceinline__ int checked_group(const RoutingPlanParams& p, int sample) {
  const long long group = p.groups[sample];
  if (group < 0 || group >= p.num_groups) {
    trap();
    return 0;
  }
  return static_cast<int>(group);
}

__device__ __forceinline__ void count_samples(const RoutingPlanParams& p, int* counters) {
  for (int i = threadIdx.x; i < p.counting_warps * p.num_groups; i += blockDim.x) counters[i] = 0;
  block_sync();
  const SliceOfBatch slice = slice_of_warp(p);
  int* own = counters + threadIdx.x / kWarp * p.num_groups;
  for (int i = slice.begin + threadIdx.x % kWarp; i < slice.end; i += kWarp) {
    atomic_add_int(own + checked_group(p, i), 1);
  }
  block_sync();
}

// Turns the counts into: offsets, and for each warp and group the number of the group's samples in earlier slices.
__device__ __forceinline__ void scan_counts(const RoutingPlanParams& p, int* counters, int* offsets, int* warp_sums) {
  int before = 0;
  for (int base = 0; base < p.num_groups; base += blockDim.x) {
    const int group = base + threadIdx.x;
    int value[kTileLevels] = {}, total[kTileLevels] = {};
    for (int w = 0; w < p.counting_warps && group < p.num_groups; ++w) {
      int& counter = counters[w * p.num_groups + group];
      const int samples = counter;
      counter = value[0];
      value[0] += samples;
    }
    exclusive_block_scan(value, total, 1, warp_sums);
    if (group < p.num_groups) {
      offsets[group] = before + value[0];
      p.offsets[group] = before + value[0];
    }
    before += total[0];
  }
  if (threadIdx.x == 0) {
    offsets[p.num_groups] = p.batch;
    p.offsets[p.num_groups] = p.batch;
  }
  block_sync();
}

// The lanes of the warp whose group is this lane's, bit by bit of the group's number; none for a group below 0.
__device__ __forceinline__ unsigned lanes_of_group(int group, int num_groups) {
  unsigned lanes = ballot(group >= 0);
  for (int bit = 0; (num_groups - 1) >> bit; ++bit) {
    const bool one = group >> bit & 1;
    const unsigned ones = ballot(one);
    lanes &= one ? ones : ~ones;
  }
  return group >= 0 ? lanes : 0;
}

// Each warp walks its slice in order; samples of one group within a step are ranked by lane, so the sort is stable.
__device__ __forceinline__ void place_samples(const RoutingPlanParams& p, int* counters, const int* offsets) {
  const int lane = threadIdx.x % kWarp;
  const SliceOfBatch slice = slice_of_warp(p);
  int* own = counters + threadIdx.x / kWarp * p.num_groups;
  for (int base = slice.begin; base < slice.end; base += kWarp) {
    const int sample = base + lane;
    const int group = sample < slice.end ? checked_group(p, sample) : -1;
    const unsigned peers = lanes_of_group(group, p.num_groups);
    const unsigned earlier = TDC_PLANTED(PLAN_UNSTABLE) ? ~0u << lane << 1 : (1u << lane) - 1;
    const int rank = __popc(peers & earlier), same = __popc(peers);
    int first = 0;
    if (group >= 0) first = own[group];
    warp_sync();  // all lanes have read the counter before one moves it
    if (group >= 0) {
      if (rank == 0) own[group] = first + same;
      const int position = offsets[group] + first + rank;
      p.order[position] = sample;
      p.inverse[sample] = position;
      p.sorted_groups[position] = group;
    }
    warp_sync();
  }
  block_sync();
}

// The tile tables, `levels_per_pass` levels at a time: a scan gives the first tile of every group, then each sorted
// position that starts a tile writes its row.
__device__ __forceinline__ void write_tiles(const RoutingPlanParams& p, int* starts, const int* offsets,
                                            int* warp_sums) {
  int* rows = p.tiles;
  for (int level = 0; level < kTileLevels; level += p.levels_per_pass) {
    const int count = min(p.levels_per_pass, kTileLevels - level);
    int before[kTileLevels] = {};
    for (int base = 0; base < p.num_groups; base += blockDim.x) {
      const int group = base + threadIdx.x;
      const int samples = group < p.num_groups ? offsets[group + 1] - offsets[group] : 0;
      int value[kTileLevels], total[kTileLevels] = {};
#pragma unroll
      for (int k = 0; k < kTileLevels; ++k) value[k] = (samples + (1 << (level + k)) - 1) >> (level + k);
      exclusive_block_scan(value, total, count, warp_sums);
#pragma unroll
      for (int k = 0; k < kTileLevels; ++k) {
        if (k >= count) break;
        if (group < p.num_groups) starts[k * p.num_groups + group] = before[k] + value[k];
        before[k] += total[k];
      }
    }
    block_sync();
    for (int position = threadIdx.x; position < p.batch; position += blockDim.x) {
      const int group = static_cast<int>(p.sorted_groups[position]);
      const int within = position - offsets[group], left = offsets[group + 1] - position;
      int* level_rows = rows;
#pragma unroll
      for (int k = 0; k < kTileLevels; ++k) {
        if (k >= count) break;
        const int size = 1 << (level + k);
        if ((within & (size - 1)) == 0) {
          int* row = level_rows + 3 * (starts[k * p.num_groups + group] + (within >> (level + k)));
          row[0] = group;
          row[1] = position;
          row[2] = min(size, left + (TDC_PLANTED(PLAN_TILE_PAST_GROUP) ? 1 : 0));
        }
        level_rows += 3 * tile_rows(p, level + k);
      }
    }
#pragma unroll
    for (int k = 0; k < kTileLevels; ++k) {
      if (k >= count) break;
      const int capacity = tile_rows(p, level + k);
      for (int row = before[k] + threadIdx.x; row < capacity; row += blockDim.x) {
        rows[3 * row] = -1;
        rows[3 * row + 1] = 0;
        rows[3 * row + 2] = 0;
      }
      rows += 3 * capacity;
    }
    block_sync();  // the next pass overwrites `starts`
  }
}

__device__ __forceinline__ void routing_plan(const RoutingPlanParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  int* warp_sums = reinterpret_cast<int*>(shared);
  int* offsets = warp_sums + kTileLevels * kWarp;
  int* counters = offsets + p.num_groups + 1;
  count_samples(p, counters);
  scan_counts(p, counters, offsets, warp_sums);
  place_samples(p, counters, offsets);
  write_tiles(p, counters, offsets, warp_sums);
}

}  // namespace tdc
