// Which tiles there are and who computes them, known on the device alone: blocks take turns at a list in which the
// expensive ones come first, so that any group sizes and widths leave them about equal work.
//
//   class 0   tiles with live channels and all of their samples; groups with more live channels of the source first
//   class 1   the same, of what is left of each group when its samples are no multiple of a tile's; of equal groups
//             those with more left first
//   class 2   tiles without a live channel, which only write zeros
//
// Within a group tiles of the same pixels are neighbours, so that these are in the L2 cache. Blocks that find no tile
// of class 0 in the last turn of it share class 1 until they have about as much work as the others (HopperTurns).
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_shared.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

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

  // Tiles of class 0; of classes 0 and 1.
  __device__ __forceinline__ int whole() const { return groups_[p_.routing.num_groups - 1].ends[0]; }
  __device__ __forceinline__ int live() const { return whole() + groups_[p_.routing.num_groups - 1].ends[1]; }

  // About what a tile of class 0 or 1 takes: the products of its patches, and 2,000 clocks to begin and store it.
  __device__ __forceinline__ int clocks(int tile, int taps) const {
    const int all = whole(), kind = tile < all ? 0 : 1, samples = Extent::samples(p_);
    const HopperGroup& group = groups_[group_of(tile - kind * all, kind)];
    const int count = kind ? group.samples % samples : samples;
    const int patches = (count * Tile::kPatches + samples - 1) / samples;
    return patches * ((group.depth + 15) / 16) * taps * (Tile::kColumns / 2) + 2000;
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

  // The first group that ends past a tile of a class.
  __device__ __forceinline__ int group_of(int tile, int kind) const {
    int low = 0, high = p_.routing.num_groups - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (groups_[middle].ends[kind] > tile) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  __device__ __forceinline__ HopperWork place(int tile, int kind) const {
    const int low = group_of(tile, kind);
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

// The tiles that a block takes, one after the other. In a turn each block takes one; every other turn goes backwards,
// so that who had the cheapest tile of a turn gets the dearest of the next. Where the last tiles of class 0 are too few
// for a turn, the blocks without one have as many turns among themselves, at tiles of class 1, as fit into the time of
// a whole tile.
template <class Schedule>
class HopperTurns {
 public:
  // The list has so many tiles for each one of the schedule's, which are equal; 0: it has another order.
  __device__ __forceinline__ HopperTurns(const Schedule& schedule, int block, int blocks, int taps, int copies = 1)
      : schedule_(schedule), block_(block), blocks_(blocks), taps_(taps), copies_(copies) {}

  __device__ __forceinline__ int next() {
    if (sharing_) {
      const int tile = share();
      if (tile >= 0) return tile;
    }
    const int place = backward_ ? blocks_ - 1 - block_ : block_, tile = first_ + place;
    const int whole = schedule_.whole() * copies_ - first_;
    first_ += blocks_;
    backward_ = !backward_ && !TDC_PLANTED(HOPPER_TURNS_FORWARD);
    if (0 < whole && whole < blocks_ && !TDC_PLANTED(HOPPER_REST_NOT_SHARED)) {
      sharing_ = true, own_ = place - whole, free_ = blocks_ - whole, dearest_ = first_ - 1;
    }
    return tile;
  }

 private:
  __device__ __forceinline__ int clocks(int tile) const { return schedule_.clocks(tile / copies_, taps_); }

  // The next tile that is shared; -1: this block gets none, and all take turns again.
  __device__ __forceinline__ int share() {
    const int whole = schedule_.whole() * copies_, live = schedule_.live() * copies_;
    const int most = clocks(whole - 1);
    while (first_ < live) {
      taken_ += clocks(dearest_);
      if (taken_ > most) break;
      if (TDC_PLANTED(HOPPER_SHARED_TWICE) && own_ < 0) break;
      const int tile = first_ + free_ - 1 - own_;
      dearest_ = first_;
      first_ += free_;
      if (own_ >= 0) return tile;
    }
    sharing_ = false;
    // Who has less comes first: the blocks with a whole tile where the others have more.
    if (taken_ > most) backward_ = !backward_;
    return -1;
  }

  const Schedule& schedule_;
  const int block_, blocks_, taps_, copies_;
  int first_ = 0;  // tile of the turn
  bool backward_ = false;
  bool sharing_ = false;
  int own_ = 0, free_ = 0;  // the block's place among those without a whole tile, if not negative; how many these are
  // Of the last of these, which got the cheapest tile of the first turn, and then the dearest of each: its last tile;
  // clocks of those before.
  int dearest_ = 0, taken_ = 0;
};

}  // namespace tdc
