// Shared memory of the Hopper form of wgrad: where everything lies, and who reads a stage.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_shared.cuh"
#include "cuda/conv/hopper_wgrad_params.h"

namespace tdc {

template <class Unit>
struct HopperWgradShared {
  unsigned char* stages;
  HopperWgradControl* control;
  HopperWgradGroup* groups;

  __device__ __forceinline__ HopperWgradShared(unsigned char* memory, int number_of_stages) : stages(memory) {
    control = reinterpret_cast<HopperWgradControl*>(memory + number_of_stages * Unit::kStageBytes);
    groups = reinterpret_cast<HopperWgradGroup*>(control + 1);
  }

  __device__ __forceinline__ unsigned char* dy(int stage) const { return stages + stage * Unit::kStageBytes; }
  __device__ __forceinline__ unsigned char* x(int stage) const { return dy(stage) + 2 * kHopperPatch; }

  // One thread. `warps` read the stages: the 8 that multiply and those that sum for the bias.
  __device__ __forceinline__ void init_barriers(int number_of_stages, int warps) const {
    for (int i = 0; i < number_of_stages; ++i) hopper_init_pair(&control->full[i], &control->empty[i], warps);
    for (int i = 0; i < kHopperMessages; ++i) {
      hopper_init_pair(&control->message_full[i], &control->message_empty[i], warps);
    }
    mbarrier_init_fence();
  }

  // Whether a stage holds what is none of its group's, which the warps that multiply set to zero.
  __device__ __forceinline__ bool is_ragged(int stage) const {
    const HopperWgradStage& what = control->stages[stage];
    return what.live_out < kHopperUnit || (Unit::kOfRows && what.pixels < 64);
  }
};

// Columns of the products of a unit with so many live input channels: of each tap, or of all of its blocks of 128 where
// it has several.
template <class Unit>
__device__ __forceinline__ int hopper_wgrad_columns(int live_in) {
  live_in -= TDC_PLANTED(HOPPER_NARROW_COLUMNS) ? 1 : 0;
  if (Unit::kIn > 128) return min(max((live_in + 63) / 64 * 64, 64), Unit::kIn);
  return live_in <= 64 ? 64 : live_in <= 96 ? 96 : 128;
}

// The time of a patch of a unit with so many live channels: kHopperUnitEnd says how it is counted.
template <class Unit>
__device__ __forceinline__ int hopper_wgrad_patch(int live_in, int live_out) {
  if (TDC_PLANTED(HOPPER_EQUAL_PATCHES)) return kHopperMostPatch<Unit>;
  const int columns = hopper_wgrad_columns<Unit>(live_in) * (Unit::kOfRows ? 1 : Unit::kParts);
  return max(columns / (live_out > 64 ? 16 : 32), kHopperLeastPatch<Unit>);
}

// Warps that read a stage, and the barrier of them all.
__device__ __forceinline__ int hopper_wgrad_readers(const ConvHopperWgradParams& p) {
  return 8 + (p.bias_sums ? kHopperBiasWarps : 0);
}
__device__ __forceinline__ void hopper_wgrad_readers_sync(const ConvHopperWgradParams& p) {
  named_barrier_sync(1, 32 * hopper_wgrad_readers(p));
}

}  // namespace tdc
