// The Hopper form of stride 2: where the rows of a tile lie for 3x3 and 4x4 filters (hopper_strided_params.h). The rest
// is hopper_rows.cuh.
//
//   forward   tap (r, s) of y at (i, j) is x at (2 i + r - 1, 2 j + s - 1): of the plane of that parity, at (i - 1, .)
//             where r is 0, (i, .) where it is 1 or 2, (i + 1, .) where it is 3
//   dgrad     dx at (2 i + a, 2 j + b), of plane (a, b), meets the rows of the filter with r - 1 = a mod 2: rows 1 and
//             3 with dy at (i, .) and (i - 1, .) where a is 0, rows 0 and 2 with dy at (i + 1, .) and (i, .) where it
//             is 1. Planes have 1, 2, 2 and 4 taps of 3x3 filters, 4 of 4x4, so no product is wasted. Of 3x3 filters
//             all tiles of the longest plane come first, of 4x4 those of the same pixels of dy are neighbours
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_rows.cuh"
#include "cuda/conv/hopper_schedule.cuh"
#include "cuda/conv/hopper_strided_params.h"

namespace tdc {

template <class Tile>
struct HopperExtent<Tile, ConvHopperStridedParams> {
  using Params = ConvHopperStridedParams;
  __device__ __forceinline__ static int samples(const Params& p) { return p.box_samples; }
  __device__ __forceinline__ static int height(const Params& p) { return p.box_height; }
  __device__ __forceinline__ static int width(const Params& p) { return p.box_width; }
};

template <class Tile_, bool kForward_>
class HopperStridedLayout {
 public:
  using Tile = Tile_;
  using Params = ConvHopperStridedParams;
  using Schedule = HopperSchedule<Tile, Params>;
  static constexpr bool kForward = kForward_;

  __device__ __forceinline__ explicit HopperStridedLayout(const Params& p) : p_(p) {}

  __device__ __forceinline__ void prefetch_maps() const {
#pragma unroll
    for (int plane = 0; plane < kHopperPlanes; ++plane) {
      if (kForward || plane == 0) tensor_map_prefetch(map_of(p_.source, plane));
      if (!kForward || plane == 0) tensor_map_prefetch(map_of(p_.result, plane));
    }
  }

  __device__ __forceinline__ HopperWork find(const Schedule& schedule, int tile) const {
    if (kForward) return schedule.find(tile);
    if (p_.filter == 4) {
      HopperWork work = schedule.find(tile / kHopperPlanes);
      work.plane = tile % kHopperPlanes;
      return work;
    }
    const int total = schedule.total();
    int plane = kHopperPlanes - 1;
    for (; plane > 0 && tile >= total; --plane) tile -= total;
    HopperWork work = schedule.find(tile);
    work.plane = plane;
    return work;
  }

  // Of HopperTurns. Tiles of different planes are equal only of 4x4 filters.
  __device__ __forceinline__ int copies() const { return kForward ? 1 : p_.filter == 4 ? kHopperPlanes : 0; }

  __device__ __forceinline__ int taps(const HopperWork& work) const {
    return kForward ? p_.filter * p_.filter : taps_along(work.plane / 2) * taps_along(work.plane % 2);
  }
  __device__ __forceinline__ int rows(const HopperWork& work) const { return work.count << p_.box_pixels_log2; }
  __device__ __forceinline__ int source_seam() const { return p_.source_channels; }
  // 4x4 filters are those of upsampled images, whose dgrad is the forward here.
  __device__ __forceinline__ bool reads_gradient() const { return kForward == (p_.filter == 4); }
  __device__ __forceinline__ int of_filter(const HopperWork& work, int tap) const {
    const Tap at = tap_at(work, tap);
    return p_.filter * at.row + at.column;
  }

  __device__ __forceinline__ void load_source(const HopperWork& work, int tap, bool, int channel, void* to,
                                              Mbarrier* full) const {
    const Tap filter = tap_at(work, tap);
    int plane = 0, down, across;
    if (kForward) {
      plane = (filter.row + 1) % 2 * 2 + (filter.column + 1) % 2;
      down = (filter.row + 1) / 2 - 1, across = (filter.column + 1) / 2 - 1;
    } else {
      down = (work.plane / 2 + 1 - filter.row) / 2, across = (work.plane % 2 + 1 - filter.column) / 2;
    }
    if (TDC_PLANTED(HOPPER_WRONG_LINE) && down) down = 0;
    if (TDC_PLANTED(HOPPER_WRONG_PLANE) && kForward) plane ^= plane == 3 ? 1 : 0;
    const int at[4] = {channel, work.x + across, work.y + down, work.first};
    tma_load(to, map_of(p_.source, plane), full, at);
  }

  __device__ __forceinline__ void load_residual(const HopperWork& work, int row, int channel, void* to,
                                                Mbarrier* full) const {
    int at[4];
    place(work, row, channel, at);
    tma_load(to, map_of(p_.residual, work.plane), full, at);
  }

  // TMA clips at the edges of the plane; the 16 rows are of one sample.
  __device__ __forceinline__ void store(const HopperWork& work, int row, int, int channel,
                                        const unsigned char* from) const {
    if (channel >= p_.result_channels) return;
    int at[4];
    place(work, row, channel, at);
    const int plane = work.plane ^ (TDC_PLANTED(HOPPER_WRONG_PLANE) && !kForward && work.plane == 3 ? 1 : 0);
    tma_store(map_of(p_.result, plane), from, at);
  }

  __device__ __forceinline__ int sample(const HopperWork& work, int row) const {
    return work.first + (row >> p_.box_pixels_log2);
  }

 private:
  struct Tap {
    int row, column;  // of the filter
  };

  // In dgrad, of pixels of a parity: 1 or 2, every other one of the filter.
  __device__ __forceinline__ int taps_along(int parity) const { return (p_.filter + parity) / 2; }

  __device__ __forceinline__ Tap tap_at(const HopperWork& work, int tap) const {
    // For every step: divisors that the compiler knows.
    if (kForward) {
      const int row = p_.filter == 4 ? tap / 4 : tap / 3;
      return {row, tap - row * p_.filter};
    }
    const int down = work.plane / 2, across = work.plane % 2, second = taps_along(across) - 1;
    return {1 - down + (tap >> second) * 2, 1 - across + (tap & second) * 2};
  }

  __device__ __forceinline__ static const TensorMap* map_of(const HopperPlaneMaps& maps, int plane) {
    return plane / 2 ? plane % 2 ? &maps.odd_odd : &maps.odd_even : plane % 2 ? &maps.even_odd : &maps.even_even;
  }

  // Where 16 rows lie in the result.
  __device__ __forceinline__ void place(const HopperWork& work, int row, int channel, int (&at)[4]) const {
    const int within = row & ((1 << p_.box_pixels_log2) - 1);
    at[0] = channel, at[1] = work.x, at[2] = work.y + (within >> p_.box_width_log2), at[3] = sample(work, row);
  }

  const Params& p_;
};

}  // namespace tdc
