// The producer of the Hopper form of wgrad: goes along its block's part of the line of work, tells the consumers what
// to sum, unit by unit, and loads the patches that they read.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/hopper_wgrad_schedule.cuh"
#include "cuda/conv/hopper_wgrad_shared.cuh"

namespace tdc {

// Loads everything. One thread.
template <class Unit>
class HopperWgradProducer {
 public:
  __device__ __forceinline__ HopperWgradProducer(const ConvHopperWgradParams& p, const HopperWgradShared<Unit>& shared)
      : p_(p), shared_(shared), schedule_(p, shared.groups) {}

  __device__ __forceinline__ void run() {
    const int part = blockIdx.x, parts = schedule_.parts();
    const int begin = part < parts ? schedule_.cut(part) : 0, end = part < parts ? schedule_.cut(part + 1) : 0;
    for (int position = begin; position < end;) {
      const HopperUnit unit = schedule_.find(position);
      const HopperWgradGroup& first = schedule_.group(unit.run);
      const int patch = schedule_.patch_from(unit, position), length = schedule_.patch_from(unit, end) - patch;
      position = unit.begin + first.patches * unit.of_patch;
      if (length == 0) continue;
      const bool starts = patch == 0, whole = length == first.patches;
      HopperWgradWork work;
      work.expert = first.expert, work.row = unit.row, work.in = unit.in, work.out = unit.out;
      work.live_in = first.expert_in - unit.in, work.live_out = first.expert_out - unit.out;
      work.patches = walk<false>(unit, patch, length);
      work.slot = whole ? -1 : 2 * part + (starts ? 1 : 0);
      send(work);
      walk<true>(unit, patch, length);
    }
    HopperWgradWork none = {};
    none.expert = -1;
    send(none);
  }

 private:
  __device__ __forceinline__ void send(const HopperWgradWork& work) {
    HopperWgradControl& c = *shared_.control;
    if (!TDC_PLANTED(HOPPER_NO_MESSAGE_WAIT)) {
      mbarrier_wait(&c.message_empty[messages_.stage], messages_.parity ^ 1);
    }
    c.messages[messages_.stage] = work;
    mbarrier_arrive(&c.message_full[messages_.stage]);
    messages_.next(kHopperMessages);
  }

  // Goes through `length` patches of a unit from `patch` on, group after group; loads those of groups with live
  // channels there, or counts them.
  template <bool kLoad>
  __device__ __forceinline__ int walk(const HopperUnit& unit, int patch, int length) {
    int count = 0;
    for (int i = unit.run; length > 0; ++i) {
      const HopperWgradGroup& group = schedule_.group(i);
      const int left = group.before + schedule_.patches_of(group) - patch;
      if (left <= 0) continue;
      const int here = min(left, length);
      if (schedule_.is_live(group, unit)) {
        if (kLoad) load(unit, group, patch - group.before, here);
        count += here;
      }
      patch += here, length -= here;
    }
    return count;
  }

  __device__ __forceinline__ void load(const HopperUnit& unit, const HopperWgradGroup& group, int patch, int count) {
    if constexpr (Unit::kOfRows) {
      if (p_.patch_samples) {
        load_boxes(unit, group, patch, count);
        return;
      }
      const int end = (group.first + group.samples) * p_.pixels, row = TDC_PLANTED(HOPPER_WRONG_ROW) ? 4 : unit.row;
      const int samples = 64 / p_.pixels;  // of a patch, where there are several taps
      int sample = group.first + samples * patch;
      for (int pixel = group.first * p_.pixels + 64 * patch; count > 0; --count, pixel += 64, sample += samples) {
        int of_x[4] = {unit.in, pixel, 0, 0};
        const int of_dy[4] = {unit.out, pixel, 0, 0};
        if (p_.taps > 1) of_x[1] = row % 3 - 1, of_x[2] = row / 3 - 1, of_x[3] = sample;
        load_stage(unit, group, x_of(unit), &p_.dy, of_x, of_dy, end - pixel, pixel);
      }
    } else {
      int across = patch % p_.patches_across, down = patch / p_.patches_across % p_.patches_down;
      int sample = group.first + patch / p_.patches_across / p_.patches_down;
      for (int first_row = group.first * p_.sample_rows + 64 * patch; count > 0; --count, first_row += 64) {
        const int row = unit.row - (TDC_PLANTED(HOPPER_WRONG_ROW) ? 0 : 1);
        const int of_x[4] = {unit.in, 8 * across - 1, 8 * down + row, sample};
        const int of_dy[4] = {unit.out, 8 * across, 8 * down, sample};
        load_stage(unit, group, x_of(unit), &p_.dy, of_x, of_dy, 64, first_row);
        if (++across == p_.patches_across) {
          across = 0;
          if (++down == p_.patches_down) down = 0, ++sample;
        }
      }
    }
  }

  // Patches that are boxes. With stride 2 those of x are of the plane that the tap meets, a pixel back where the tap is
  // 0; with upsampling those of dy's window sums are, a pixel on where it is 0.
  __device__ __forceinline__ void load_boxes(const HopperUnit& unit, const HopperWgradGroup& group, int patch,
                                             int count) {
    const int row = TDC_PLANTED(HOPPER_WRONG_ROW) ? 1 : unit.row / 3, column = unit.row % 3;
    const int step = p_.upsampled ? 1 : -1;
    int across = patch % p_.patches_across, down = patch / p_.patches_across % p_.patches_down;
    int before = patch / p_.patches_across / p_.patches_down * p_.patch_samples;
    for (int first_row = group.first * p_.sample_rows + 64 * patch; count > 0; --count, first_row += 64) {
      int of_box[4] = {unit.out, across * p_.patch_side, down * p_.patch_side, group.first + before};
      int of_plane[4] = {unit.in, of_box[1] + (column == 0 ? step : 0), of_box[2] + (row == 0 ? step : 0), of_box[3]};
      const int pixels = (group.samples - before) * p_.patch_side * p_.patch_side;
      if (p_.upsampled) {
        of_box[0] = unit.in, of_plane[0] = unit.out;
        load_stage(unit, group, &p_.x, plane_of(p_.dy, row == 1, column == 1), of_box, of_plane, pixels, first_row);
      } else {
        load_stage(unit, group, plane_of(p_.x, row != 1, column != 1), &p_.dy, of_plane, of_box, pixels, first_row);
      }
      if (++across == p_.patches_across) {
        across = 0;
        if (++down == p_.patches_down) down = 0, before += p_.patch_samples;
      }
    }
  }
  __device__ __forceinline__ const TensorMap* plane_of(const TensorMap& even_even, bool down, bool across) const {
    return down ? across ? &p_.odd_odd : &p_.odd_even : across ? &p_.even_odd : &even_even;
  }

  __device__ __forceinline__ const TensorMap* x_of(const HopperUnit& unit) const {
    return unit.in >= p_.seam ? &p_.x2 : &p_.x;
  }

  // A patch, of which `pixels` count.
  __device__ __forceinline__ void load_stage(const HopperUnit& unit, const HopperWgradGroup& group, const TensorMap* x,
                                             const TensorMap* dy, const int (&of_x)[4], const int (&of_dy)[4],
                                             int pixels, int first_row) {
    HopperWgradControl& c = *shared_.control;
    const int stage = stages_.stage;
    if (!TDC_PLANTED(HOPPER_NO_EMPTY_WAIT)) {
      mbarrier_wait(&c.empty[stage], stages_.parity ^ (TDC_PLANTED(HOPPER_WRONG_PHASE) ? 0 : 1));
    }
    // Of an expert with one group the dead channels are cut off at the end instead.
    c.stages[stage].live_out = group.shared ? group.live_out - unit.out : kHopperUnit;
    c.stages[stage].pixels = TDC_PLANTED(HOPPER_NO_LAST_PIXEL) ? 64 : pixels;
    c.stages[stage].first_row = first_row;
    mbarrier_arrive_expect(&c.full[stage], Unit::kStageBytes - (TDC_PLANTED(HOPPER_WRONG_BYTES) ? 128 : 0));
    const int seam = unit.in >= p_.seam ? p_.seam : 0;
    for (int box = 0; box < Unit::kBoxes; ++box) {
      const int at[4] = {of_x[0] + 64 * box - seam, of_x[1], of_x[2], of_x[3]};
      tma_load(shared_.x(stage) + box * Unit::kBoxBytes, x, &c.full[stage], at);
    }
    for (int box = 0; box < 2; ++box) {
      const int at[4] = {of_dy[0] + 64 * box, of_dy[1], of_dy[2], of_dy[3]};
      tma_load(shared_.dy(stage) + box * kHopperPatch, dy, &c.full[stage], at);
    }
    stages_.next(p_.stages);
  }

  const ConvHopperWgradParams& p_;
  const HopperWgradShared<Unit>& shared_;
  HopperWgradSchedule<Unit> schedule_;
  HopperRing stages_, messages_;
};

}  // namespace tdc
