// Where the rows of a tile lie in the form of rows: the pixels of a group's samples one after the other, of whole
// images. With two inputs the depth is the channels of x, then those of x2; in dgrad no tile has channels of both.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_rows_params.h"
#include "cuda/conv/hopper_schedule.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

template <class Tile_, bool kForward_>
class HopperRowsLayout {
 public:
  using Tile = Tile_;
  using Params = ConvHopperRowsParams;
  using Schedule = HopperSchedule<Tile, Params>;
  static constexpr bool kForward = kForward_;

  __device__ __forceinline__ explicit HopperRowsLayout(const Params& p) : p_(p) {}

  __device__ __forceinline__ void prefetch_maps() const {
    tensor_map_prefetch(&p_.source), tensor_map_prefetch(&p_.result);
  }

  // Tile number `tile`; its taps; how many of its rows belong to the group.
  __device__ __forceinline__ static HopperWork find(const Schedule& schedule, int tile) { return schedule.find(tile); }
  __device__ __forceinline__ static constexpr int copies() { return 1; }  // of HopperTurns
  __device__ __forceinline__ int taps(const HopperWork&) const { return p_.taps; }
  __device__ __forceinline__ int rows(const HopperWork& work) const { return work.count; }
  __device__ __forceinline__ int source_seam() const { return p_.source_seam; }
  // Whether the source is a gradient, which may hold anything past its width.
  __device__ __forceinline__ static constexpr bool reads_gradient() { return !kForward; }

  // The tap of the filter: in dgrad tap t of dx is tap 8 - t of it.
  __device__ __forceinline__ int of_filter(const HopperWork&, int tap) const {
    return kForward ? tap : p_.taps - 1 - tap;
  }

  // Loads 64 channels of all rows, moved by a tap, from a channel of one input on.
  __device__ __forceinline__ void load_source(const HopperWork& work, int tap, bool second, int channel, void* to,
                                              Mbarrier* full) const {
    int at[4] = {channel, work.first, 0, 0};
    if (p_.taps > 1) at[1] = tap % 3 - 1, at[2] = tap / 3 - 1, at[3] = quotient(work.first, p_.by_rows);
    tma_load(to, second ? &p_.source2 : &p_.source, full, at);
  }

  // Of 16 rows from `row` on: 64 channels of the residual.
  __device__ __forceinline__ void load_residual(const HopperWork& work, int row, int channel, void* to,
                                                Mbarrier* full) const {
    const int at[4] = {channel, work.first + row, 0, 0};
    tma_load(to, &p_.residual, full, at);
  }

  // The same of the result, of which `count` rows belong to the group. TMA clips at the end of the tensor, not of the
  // group: fewer than 16 rows are stored one by one.
  __device__ __forceinline__ void store(const HopperWork& work, int row, int count, int channel,
                                        const unsigned char* from) const {
    const bool second = work.column >= p_.result_seam;
    const int base = second ? p_.result_seam : 0, end = second ? p_.result_channels : p_.result_seam;
    if (channel >= end) return;
    if (TDC_PLANTED(HOPPER_WHOLE_ROWS)) count = 16;
    int at[4] = {channel - base, work.first + row, 0, 0};
    if (count == 16) {
      tma_store(second ? &p_.result2 : &p_.result, from, at);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i, ++at[1]) {
      tma_store(second ? &p_.result2_row : &p_.result_row, from + i * kHopperRow, at);
    }
  }

  // The sample of a row, which may be past the last.
  __device__ __forceinline__ int sample(const HopperWork& work, int row) const {
    return quotient(work.first + row, p_.by_rows);
  }

 private:
  const Params& p_;
};

}  // namespace tdc
