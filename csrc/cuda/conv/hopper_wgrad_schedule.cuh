// The work of wgrad as one line, cut into equal parts, one per block: balanced for any groups. Known on the device
// alone.
//
//   line     expert after expert; of an expert its units with live channels; of a unit the patches of the expert's
//            groups. Units that a cut divides are summed from their parts, in the line's order, by a second kernel
//   length   a patch takes as much of the line as time: those of units with few live channels take less. Who has a
//            position has the patch that begins there
//   parts    where all units are equally long, as many as cut each into equal parts, if the SMs that these leave idle
//            would save less than such cuts do; else one per SM, and before its patches a unit takes as much of the
//            line as its end takes time: who gets many small units has fewer patches
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/hopper_wgrad_shared.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

struct HopperUnit {
  int run;  // the first group of its expert
  int row, in, out;
  int begin, of_patch;  // where its first patch begins in the line; what a patch takes of it
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
  __device__ __forceinline__ int parts() const { return groups_->parts; }
  __device__ __forceinline__ int cut(int i) const {
    return static_cast<int>(static_cast<long long>(i) * total() / max(1, parts()));
  }
  // The part that has a patch of a unit.
  __device__ __forceinline__ int part_of(const HopperUnit& unit, int patch) const {
    const long long position = unit.begin + patch * unit.of_patch;
    return static_cast<int>(((position + 1) * parts() - 1) / total());
  }
  // The first of a unit's patches that begins at a position or past it; the number of all where none does.
  __device__ __forceinline__ int patch_from(const HopperUnit& unit, int position) const {
    const int past = position - unit.begin, more = TDC_PLANTED(HOPPER_PATCH_TWICE) ? 0 : unit.of_patch - 1;
    return past <= 0 ? 0 : min((past + more) / unit.of_patch, groups_[unit.run].patches);
  }

  // The unit that has a position < total().
  __device__ __forceinline__ HopperUnit find(int position) const {
    int low = 0, high = p_.routing.num_groups - 1;  // the first group whose expert's share ends past the position
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
    const int within = position - begin_of_run(unit.run), out_tile = within / first.length;
    unit.out = out_tile * kHopperUnit;
    int left = within - out_tile * first.length, tile = 0, length = unit_end() + place(unit, 0);
    for (const int last = in_tiles(reach(first.expert_in)) - 1; tile < last && left >= p_.rows * length; ++tile) {
      left -= p_.rows * length;
      length = unit_end() + place(unit, tile + 1);
    }
    unit.row = left / length;
    unit.begin = position - left + unit.row * length + unit_end();
    return unit;
  }

  // The first group of an expert, or -1.
  __device__ __forceinline__ int run_of(int expert) const {
    for (int i = 0; i < p_.routing.num_groups; ++i) {
      if (groups_[i].expert == expert) return i;
    }
    return -1;
  }
  // Where a unit of a run (or -1) is in the line; false where it is not live.
  __device__ __forceinline__ bool locate(HopperUnit& unit) const {
    if (unit.run < 0) return false;
    const HopperWgradGroup& first = groups_[unit.run];
    const int in = unit.in;
    if (in >= reach(first.expert_in) || unit.out >= first.expert_out || first.patches == 0) return false;
    int position = begin_of_run(unit.run) + unit.out / kHopperUnit * first.length;
    int tile = 0, length = place(unit, 0);
    for (; unit.in < in; length = place(unit, ++tile)) position += p_.rows * (unit_end() + length);
    unit.begin = position + unit.row * (unit_end() + length) + unit_end();
    return true;
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
  __device__ __forceinline__ bool has_units(const HopperWgradGroup& group) const {
    return group.run >= 0 && group.patches > 0 && reach(group.expert_in) > 0 && group.expert_out > 0;
  }
  __device__ __forceinline__ int begin_of_run(int run) const { return run > 0 ? groups_[run - 1].end : 0; }
  // What a unit takes of the line before its patches.
  __device__ __forceinline__ int unit_end() const { return groups_->unit_end; }

  // Sets the input channels of a unit to those of a tile, and what a patch takes; what all of its patches take.
  __device__ __forceinline__ int place(HopperUnit& unit, int tile) const {
    const HopperWgradGroup& first = groups_[unit.run];
    unit.in = begin_of_tile(tile);
    unit.of_patch = hopper_wgrad_patch<Unit>(first.expert_in - unit.in, first.expert_out - unit.out);
    return first.patches * unit.of_patch;
  }
  // What the units of an expert's output channels from `out` on, 128 of them, take of the line.
  __device__ __forceinline__ int length_of(int run, int out) const {
    HopperUnit unit{run, 0, 0, out};
    int sum = 0;
    for (int tile = in_tiles(reach(groups_[run].expert_in)) - 1; tile >= 0; --tile)
      sum += unit_end() + place(unit, tile);
    return p_.rows * sum;
  }

  // One warp adds up the shares of the line, and the first groups of the experts.
  __device__ __forceinline__ void add_up(int num_groups) {
    const int lane = threadIdx.x;
    int most = 0, fewest = 1 << 30, units = 0, longest = 1;  // lengths of units; the longest patch
    for (int i = lane; i < num_groups; i += 32) {
      const HopperWgradGroup& own = groups_[i];
      if (!has_units(own)) continue;
      const int tiles = in_tiles(reach(own.expert_in)), last = out_tiles(own.expert_out) - 1;
      for (int at = 0; at < 2 * tiles; ++at) {
        HopperUnit unit{i, 0, 0, at % 2 * last * kHopperUnit};
        const int length = place(unit, at / 2);
        most = max(most, length), fewest = min(fewest, length), longest = max(longest, unit.of_patch);
      }
      units += p_.rows * tiles * (last + 1);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      most = max(most, shfl_xor(most, mask)), fewest = min(fewest, shfl_xor(fewest, mask));
      units += shfl_xor(units, mask), longest = max(longest, shfl_xor(longest, mask));
    }
    const bool are_equal =
        most == fewest && p_.equal_parts % units == 0 &&
        (most / (p_.equal_parts / units) <= units * (most + kHopperUnitEnd) / p_.blocks + kHopperCuts ||
         TDC_PLANTED(HOPPER_BLOCKS_STAY_IDLE));
    if (lane == 0) groups_->unit_end = are_equal || TDC_PLANTED(HOPPER_UNITS_END_AT_ONCE) ? 0 : kHopperUnitEnd;
    warp_sync();
    int before = 0, run = 0;
    for (int base = 0; base < num_groups; base += 32) {
      const int i = base + lane;
      HopperWgradGroup* own = groups_ + i;
      int sum = 0, first = -1;
      if (i < num_groups && own->run >= 0) first = i;
      if (i < num_groups && has_units(*own)) {
        const int last = out_tiles(own->expert_out) - 1;
        own->length = length_of(i, 0);
        sum = last * own->length + length_of(i, last * kHopperUnit);
      }
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = shfl_up(sum, distance), earlier = shfl_up(first, distance);
        if (lane >= distance) sum += other, first = max(first, earlier);
      }
      sum += before, first = max(first, run);
      if (i < num_groups) own->end = sum, own->run = first;
      before = shfl(sum, 31), run = shfl(first, 31);
    }
    // No part is shorter than a patch: all parts between two of a unit have some of it.
    if (lane == 0) groups_->parts = min(are_equal ? p_.equal_parts : p_.blocks, before / longest);
  }

  const ConvHopperWgradParams& p_;
  HopperWgradGroup* groups_;
};

}  // namespace tdc
