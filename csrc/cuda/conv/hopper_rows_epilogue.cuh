// The epilogue of the Hopper forms whose tiles are rows: where 16 rows lie is up to the layout.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_epilogue_base.cuh"
#include "cuda/conv/hopper_rows_params.h"
#include "cuda/conv/hopper_shared.cuh"

namespace tdc {

template <class Tile>
struct HopperRowsShared {
  unsigned char* stages;  // the source's rows, then the weights
  unsigned char *stores, *parts;
  HopperRowsControl* control;
  HopperGroup* groups;

  __device__ __forceinline__ HopperRowsShared(unsigned char* memory, int number_of_stages)
      : stages(memory), stores(memory + number_of_stages * Tile::kStageBytes) {
    parts = stores + 8 * Tile::kStoreBuffers * kHopperStoreBytes;
    control = reinterpret_cast<HopperRowsControl*>(parts + Tile::kPartBytes);
    groups = reinterpret_cast<HopperGroup*>(control + 1);
  }

  __device__ __forceinline__ unsigned char* source(int stage) const { return stages + stage * Tile::kStageBytes; }
  __device__ __forceinline__ unsigned char* weight(int stage) const { return source(stage) + Tile::kSourceBytes; }
  __device__ __forceinline__ unsigned char* store(int warp, int buffer) const {
    return stores + (warp * Tile::kStoreBuffers + buffer) * kHopperStoreBytes;
  }

  // One thread.
  __device__ __forceinline__ void init_barriers(int number_of_stages) const {
    for (int i = 0; i < number_of_stages; ++i) hopper_init_pair(&control->full[i], &control->empty[i]);
    for (int i = 0; i < kHopperMessages; ++i) hopper_init_pair(&control->message_full[i], &control->message_empty[i]);
    for (int warp = 0; warp < 8; ++warp) {
      for (int i = 0; i < Tile::kStoreBuffers; ++i) mbarrier_init(&control->residual_full[warp][i], 1);
      if (Tile::kSplit == 1) continue;
      mbarrier_init(&control->part_full[warp], Tile::kSplit - 1);
      mbarrier_init(&control->part_empty[warp], 1);
    }
    mbarrier_init_fence();
  }
};

template <class T, class Layout>
class HopperRowsEpilogue : public HopperEpilogueBase<HopperRowsEpilogue<T, Layout>, T, typename Layout::Tile,
                                                     typename Layout::Params, HopperRowsShared<typename Layout::Tile>> {
  using Params = typename Layout::Params;
  using Shared = HopperRowsShared<typename Layout::Tile>;
  using Base = HopperEpilogueBase<HopperRowsEpilogue, T, typename Layout::Tile, Params, Shared>;
  friend Base;
  using Base::p_;
  static constexpr bool kEarly = true;

 public:
  __device__ __forceinline__ HopperRowsEpilogue(const Params& p, const Shared& shared, int group)
      : Base(p, shared, group), layout_(p) {}

 private:
  // The warp's first row of a patch, counted from the tile's, and how many of its rows belong to the tile.
  __device__ __forceinline__ int first_row(int i) const {
    return (this->group_ * Base::kPatches + i) * 64 + this->warp_ * 16;
  }
  __device__ __forceinline__ int rows(const HopperWork& work, int i) const {
    return max(0, min(layout_.rows(work) - first_row(i), 16));
  }
  __device__ __forceinline__ bool has_rows(const HopperWork& work, int i) const { return rows(work, i) > 0; }

  __device__ __forceinline__ void load_biases(const HopperWork& work) { this->load_bias(work); }

  __device__ __forceinline__ auto sample_bias(const HopperWork& work, int i, int part) const {
    const int lane = threadIdx.x % 32, channel = work.column + part * 64 + lane % 4 * 2;
    int samples[2] = {};
    if (p_.sample_bias) {
      for (int half = 0; half < 2; ++half) {
        const int sample = layout_.sample(work, first_row(i) + lane / 4 + 8 * half);
        samples[half] = min(sample, p_.routing.batch - 1);
      }
    }
    return [this, &work, channel, upper = samples[0], lower = samples[1]](int column, float (&top)[2],
                                                                          float (&bottom)[2]) {
      const int at = channel + column * 8, channels = p_.result_channels;
      hopper_add<T>(top, hopper_pair_at<T>(p_.sample_bias, upper, at, channels, work.live));
      hopper_add<T>(bottom, hopper_pair_at<T>(p_.sample_bias, lower, at, channels, work.live));
    };
  }

  __device__ __forceinline__ void load_box(const HopperWork& work, int i, int channel, void* to, Mbarrier* full) const {
    layout_.load_residual(work, first_row(i), channel, to, full);
  }
  __device__ __forceinline__ void store_box(const HopperWork& work, int i, int channel,
                                            const unsigned char* from) const {
    layout_.store(work, first_row(i), rows(work, i), channel, from);
  }

  const Layout layout_;
};

}  // namespace tdc
