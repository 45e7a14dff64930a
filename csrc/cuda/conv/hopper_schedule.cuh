// Which tiles there are and who computes them, known on the device alone: blocks take turns at a list in which the
// expensive ones come first, so that any group sizes and widths leave them about equal work.
//
//   class 0   tiles with live channels and all of their samples; groups with more live channels of the source first
//   class 1   the same, of what is left of each group when its samples are no multiple of a tile's; of equal groups
//             those with more left first
//   class 2   tiles without a live channel, which only write zeros
//
// Within a group tiles of the same pixels are neighbours, so that these are in the L2 cache.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/routing.cuh"

namespace tdc {

// The tile that a block takes in a turn. Every other turn goes backwards, so that who had the cheapest tile of a turn
// gets the dearest of the next.
__device__ __forceinline__ int hopper_tile(int turn, int block, int blocks) {
  return turn * blocks + (turn % 2 && !TDC_PLANTED(HOPPER_TURNS_FORWARD) ? blocks - 1 - block : block);
}

// Samples and pixels of a tile.
template <class Tile, class Params>
struct HopperExtent {
  __device__ __forceinline__ static int samples(const Params&) { return Tile::kSamples; }
  __device__ __forceinline__ static int height(const Params&) { return 8 * Tile::kDown; }
  __device__ __forceinline__ static int width(const Params&) { return 8 * Tile::kAcross; }
};

template <class Tile, class Params>
class HopperSchedule {
  using Extent = HopperExtent<Tile, Params>;

 public:
  __device__ __forceinline__ HopperSchedule(const Params& p, HopperGroup* groups) : p_(p), groups_(groups) {}

  // Fills in the groups. All threads of the block call it; it ends with a barrier.
  template <bool kForward>
  __device__ __forceinline__ void make() {
    const int num_groups = p_.routing.num_groups, g = threadIdx.x;
    HopperGroup own = {};
    if (g < num_groups) {
      own = read<kForward>(g);
      groups_[g] = own;
    }
    block_sync();
    int rank = 0;
    const int samples = Extent::samples(p_), left = own.samples % samples;
    for (int other = 0; g < num_groups && other < num_groups; ++other) {
      const int depth = groups_[other].depth, left_of_other = groups_[other].samples % samples;
      const bool same = depth == own.depth, before = left_of_other > left || (left_of_other == left && other < g);
      rank += depth > own.depth || (same && before) ? 1 : 0;
    }
    block_sync();
    if (g < num_groups) groups_[rank] = own;
    block_sync();
    if (threadIdx.x < 32) add_up(num_groups);
    block_sync();
  }

  // Tiles of the list.
  __device__ __forceinline__ int total() const {
    const HopperGroup& last = groups_[p_.routing.num_groups - 1];
    return last.ends[0] + last.ends[1] + last.ends[2];
  }

  // Tile number `tile` of the list.
  __device__ __forceinline__ HopperWork find(int tile) const {
    HopperWork work = {};
    work.live = -1;
    const int num_groups = p_.routing.num_groups;
    for (int kind = 0; kind < 3; ++kind) {
      const int total = groups_[num_groups - 1].ends[kind];
      if (tile < total) return place(tile, kind);
      tile -= total;
    }
    return work;
  }

 private:
  template <bool kForward>
  __device__ __forceinline__ HopperGroup read(int g) const {
    const ConvRouting& routing = p_.routing;
    HopperGroup group = {};
    group.first = clamp_to(routing.offsets[g], routing.batch);
    group.samples = clamp_to(routing.offsets[g + 1] - group.first, routing.batch - group.first) * p_.rows_per_sample;
    group.first *= p_.rows_per_sample;
    group.expert = expert_of_group(routing, g);
    const int* of_source = kForward ? routing.in_widths : routing.out_widths;
    const int* of_result = kForward ? routing.out_widths : routing.in_widths;
    group.depth = live_width(of_source, g, p_.source_channels);
    group.live = live_width(of_result, g, p_.result_channels);
    return group;
  }

  __device__ __forceinline__ int tiles_per_image() const { return p_.tiles_down * p_.tiles_across; }
  // Tiles of so many channels, none of which has channels on both sides of the result's seam.
  __device__ __forceinline__ int columns_of(int channels) const {
    const int first = min(channels, p_.result_seam);
    return (first + Tile::kColumns - 1) / Tile::kColumns + (channels - first + Tile::kColumns - 1) / Tile::kColumns;
  }

  __device__ __forceinline__ int tiles_of(const HopperGroup& group, int kind) const {
    const int samples = Extent::samples(p_), whole = group.samples / samples, part = group.samples % samples ? 1 : 0;
    const int rows = kind == 0 ? whole : kind == 1 ? part : whole + part, live = columns_of(group.live);
    return rows * tiles_per_image() * (kind == 2 ? p_.channel_tiles - live : live);
  }

  // One warp turns the numbers of tiles of all groups into where they end.
  __device__ __forceinline__ void add_up(int num_groups) {
    const int lane = threadIdx.x;
    for (int kind = 0; kind < 3; ++kind) {
      int before = 0;
      for (int base = 0; base < num_groups; base += 32) {
        int sum = base + lane < num_groups ? tiles_of(groups_[base + lane], kind) : 0;
        for (int distance = 1; distance < 32; distance *= 2) {
          const int other = shfl_up(sum, distance);
          if (lane >= distance) sum += other;
        }
        sum += before;
        if (base + lane < num_groups) groups_[base + lane].ends[kind] = sum;
        before = shfl(sum, 31);
      }
    }
  }

  __device__ __forceinline__ HopperWork place(int tile, int kind) const {
    int low = 0, high = p_.routing.num_groups - 1;  // the first group that ends past the tile
    while (low < high) {
      const int middle = (low + high) / 2;
      if (groups_[middle].ends[kind] > tile) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const HopperGroup group = groups_[low];
    if (low > 0) tile -= groups_[low - 1].ends[kind];
    const int live = columns_of(group.live), columns = kind == 2 ? p_.channel_tiles - live : live;
    HopperWork work = {};
    const int column = (kind == 2 ? live : 0) + tile % columns, of_second = column - columns_of(p_.result_seam);
    work.column = of_second < 0 ? column * Tile::kColumns : p_.result_seam + of_second * Tile::kColumns;
    work.live = of_second < 0 ? min(group.live, p_.result_seam) : group.live;
    tile /= columns;
    work.x = tile % p_.tiles_across * Extent::width(p_);
    tile /= p_.tiles_across;
    work.y = tile % p_.tiles_down * Extent::height(p_);
    const int samples = Extent::samples(p_), row = kind == 1 ? group.samples / samples : tile / p_.tiles_down;
    work.first = group.first + row * samples;
    work.count = min(samples, group.samples - row * samples);
    work.expert = group.expert;
    work.depth = kind == 2 ? 0 : group.depth;
    return work;
  }

  const Params& p_;
  HopperGroup* groups_;
};

}  // namespace tdc
