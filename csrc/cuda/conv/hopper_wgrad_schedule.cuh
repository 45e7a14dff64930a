// The work of wgrad as one line, cut into equal parts, one per block: balanced for any groups. Known on the device
// alone.
//
//   line     expert after expert; of an expert its units with live channels; of a unit the patches of the expert's
//            groups. Units that a cut divides are summed from their parts, in the line's order, by a second kernel
//   parts    where all units have equally many patches, as many as cut each into equal parts; else one per SM, and
//            before its patches a unit takes as much of the line as its end takes time: who gets many small units has
//            fewer patches
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/routing.cuh"

namespace tdc {

// What begins at a position of the line.
struct HopperUnit {
  int run;  // the first group of its expert
  int row, in, out;
  int patch;  // of the expert's; negative: so much before the first
};

template <class Unit>
class HopperWgradSchedule {
 public:
  __device__ __forceinline__ HopperWgradSchedule(const ConvHopperWgradParams& p, HopperWgradGroup* groups)
      : p_(p), groups_(groups) {}

  // Fills in the groups. All threads of the block call it, no fewer than there are groups; it ends with a barrier.
  __device__ __forceinline__ void make() {
    const int g = threadIdx.x, num_groups = p_.routing.num_groups;
    HopperWgradGroup own = {};
    if (g < num_groups) {
      const ConvRouting& routing = p_.routing;
      own.first = clamp_to(routing.offsets[g], routing.batch);
      own.samples = clamp_to(routing.offsets[g + 1] - own.first, routing.batch - own.first);
      own.expert = expert_of_group(routing, g);
      own.live_in = live_width(routing.in_widths, g, p_.in_channels);
      own.live_out = live_width(routing.out_widths, g, p_.out_channels);
      groups_[g] = own;
    }
    block_sync();
    int rank = 0;
    own.run = num_groups;
    for (int other = 0; g < num_groups && other < num_groups; ++other) {
      const HopperWgradGroup& h = groups_[other];
      const bool same = h.expert == own.expert;
      if (h.expert < own.expert || (same && other < g)) ++rank;
      if (!same) continue;
      const int patches = patches_of(h);
      if (other < g) own.before += patches;
      own.patches += patches;
      own.expert_in = max(own.expert_in, h.live_in);
      own.expert_out = max(own.expert_out, h.live_out);
      own.shared |= other != g;
      if (other < g) own.run = -1;  // not the first
    }
    block_sync();
    if (g < num_groups) groups_[rank] = own;
    block_sync();
    if (threadIdx.x < 32) add_up(num_groups);
    block_sync();
  }

  __device__ __forceinline__ const HopperWgradGroup& group(int i) const { return groups_[i]; }
  __device__ __forceinline__ int total() const { return groups_[p_.routing.num_groups - 1].end; }
  __device__ __forceinline__ int patches_of(const HopperWgradGroup& group) const {
    if (Unit::kOfRows && !p_.patch_samples) return (group.samples * p_.pixels + 63) / 64;
    const int samples = Unit::kOfRows ? (group.samples + p_.patch_samples - 1) / p_.patch_samples : group.samples;
    return samples * p_.patches_down * p_.patches_across;
  }

  // Blocks that get a part, and where the i-th part begins.
  __device__ __forceinline__ int parts() const { return min(groups_->are_equal ? p_.equal_parts : p_.blocks, total()); }
  __device__ __forceinline__ int cut(int i) const {
    return static_cast<int>(static_cast<long long>(i) * total() / max(1, parts()));
  }
  __device__ __forceinline__ int part_of(int position) const {
    return static_cast<int>(((static_cast<long long>(position) + 1) * parts() - 1) / total());
  }

  // position < total().
  __device__ __forceinline__ HopperUnit find(int position) const {
    int low = 0, high = p_.routing.num_groups - 1;  // the first group whose share ends past the position
    while (low < high) {
      const int middle = (low + high) / 2;
      if (groups_[middle].end > position) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    HopperUnit unit;
    unit.run = groups_[low].run;
    const HopperWgradGroup& first = groups_[unit.run];
    const int within = position - begin_of_run(unit.run), length = before_unit() + first.patches;
    const int number = within / length;
    unit.patch = within - number * length - before_unit();
    unit.row = number % p_.rows;
    unit.in = begin_of_tile(number / p_.rows % in_tiles(reach(first.expert_in)));
    unit.out = number / p_.rows / in_tiles(reach(first.expert_in)) * kHopperUnit;
    return unit;
  }

  // The first group of an expert, or -1; and the position of the first patch of a live unit of it, or -1.
  __device__ __forceinline__ int run_of(int expert) const {
    for (int i = 0; i < p_.routing.num_groups; ++i) {
      if (groups_[i].expert == expert) return i;
    }
    return -1;
  }
  __device__ __forceinline__ int begin_of_unit(int run, int row, int in, int out) const {
    if (run < 0) return -1;
    const HopperWgradGroup& first = groups_[run];
    if (in >= reach(first.expert_in) || out >= first.expert_out || first.patches == 0) return -1;
    const int tile = in < p_.seam ? in / Unit::kIn : in_tiles(p_.seam) + (in - p_.seam) / Unit::kIn;
    const int number = (out / kHopperUnit * in_tiles(reach(first.expert_in)) + tile) * p_.rows + row;
    return begin_of_run(run) + number * (before_unit() + first.patches) + before_unit();
  }

  // Whether a group has live channels in a unit.
  __device__ __forceinline__ bool is_live(const HopperWgradGroup& group, const HopperUnit& unit) const {
    return reach(group.live_in) > unit.in && group.live_out > unit.out;
  }

  // Tiles of the first `channels` input channels, and where one begins: those of x come before those of x2.
  __device__ __forceinline__ int in_tiles(int channels) const {
    const int first = min(channels, p_.seam);
    return (first + Unit::kIn - 1) / Unit::kIn + (channels - first + Unit::kIn - 1) / Unit::kIn;
  }
  __device__ __forceinline__ int begin_of_tile(int tile) const {
    const int of_second = tile - in_tiles(p_.seam);
    return of_second < 0 ? tile * Unit::kIn : p_.seam + of_second * Unit::kIn;
  }
  // Where the channels of the input end that has a channel.
  __device__ __forceinline__ int end_of_input(int channel) const {
    return channel < p_.seam ? p_.seam : p_.in_channels;
  }

 private:
  __device__ __forceinline__ static int out_tiles(int channels) { return (channels + kHopperUnit - 1) / kHopperUnit; }
  // Input channels that units are for: the sums of the bias need a unit where no channel is live.
  __device__ __forceinline__ int reach(int live_in) const { return p_.bias_sums ? max(live_in, 1) : live_in; }
  __device__ __forceinline__ int begin_of_run(int run) const { return run > 0 ? groups_[run - 1].end : 0; }
  // What a unit takes of the line before its patches.
  __device__ __forceinline__ int before_unit() const {
    return groups_->are_equal || TDC_PLANTED(HOPPER_UNITS_END_AT_ONCE) ? 0 : kHopperUnitEnd<Unit>;
  }
  __device__ __forceinline__ int units_of(const HopperWgradGroup& group) const {
    return group.run < 0 || !group.patches ? 0
                                           : p_.rows * in_tiles(reach(group.expert_in)) * out_tiles(group.expert_out);
  }

  // One warp adds up the shares of the line, and the first groups of the experts.
  __device__ __forceinline__ void add_up(int num_groups) {
    const int lane = threadIdx.x;
    int most = 0, fewest = 1 << 30, units = 0;  // patches of a unit
    for (int i = lane; i < num_groups; i += 32) {
      const int own = units_of(groups_[i]), patches = groups_[i].patches;
      if (own) most = max(most, patches), fewest = min(fewest, patches), units += own;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      most = max(most, shfl_xor(most, mask)), fewest = min(fewest, shfl_xor(fewest, mask));
      units += shfl_xor(units, mask);
    }
    if (lane == 0) groups_->are_equal = most == fewest && p_.equal_parts % units == 0;
    warp_sync();
    int before = 0, run = 0;
    for (int base = 0; base < num_groups; base += 32) {
      const int i = base + lane;
      HopperWgradGroup* own = groups_ + i;
      int sum = 0, first = -1;
      if (i < num_groups) {
        sum = patches_of(*own) * p_.rows * in_tiles(reach(own->expert_in)) * out_tiles(own->expert_out);
        sum += units_of(*own) * before_unit();
        if (own->run >= 0) first = i;
      }
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = shfl_up(sum, distance), earlier = shfl_up(first, distance);
        if (lane >= distance) sum += other, first = max(first, earlier);
      }
      sum += before, first = max(first, run);
      if (i < num_groups) own->end = sum, own->run = first;
      before = shfl(sum, 31), run = shfl(first, 31);
    }
  }

  const ConvHopperWgradParams& p_;
  HopperWgradGroup* groups_;
};

}  // namespace tdc
