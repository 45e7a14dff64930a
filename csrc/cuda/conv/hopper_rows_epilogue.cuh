// The epilogue of the Hopper forms whose tiles are rows: as hopper_epilogue.cuh, but where 16 rows lie is up to the
// layout.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_epilogue.cuh"
#include "cuda/conv/hopper_rows_params.h"

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
class HopperRowsEpilogue {
  using Tile = typename Layout::Tile;
  using Params = typename Layout::Params;
  static constexpr int kPatches = Tile::kPatches / 2, kParts = Tile::kColumns / 64;  // parts: 64 channels

 public:
  using Sums = float[kPatches][Tile::kColumns / 2];

  __device__ __forceinline__ HopperRowsEpilogue(const Params& p, const HopperRowsShared<Tile>& shared, int group)
      : p_(p), layout_(p), shared_(shared), group_(group), warp_(shfl(static_cast<int>(threadIdx.x) / 32 % 4, 0)) {}

  // Begins to load what is added to a tile, so that it arrives while the products are made.
  __device__ __forceinline__ void prepare(const HopperWork& work) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int channel = work.column + 64 * part + 2 * lane;
      bias_[part] = hopper_pair_at<T>(p_.bias, work.expert, channel, p_.result_channels, work.live);
    }
    if (!adds_residual(work)) return;
    for (int i = 0; i < Tile::kStoreBuffers; ++i) load_residual(work, i, (buffer_ + i) % Tile::kStoreBuffers);
  }

  __device__ __forceinline__ void finish(const HopperWork& work, const Sums& sums) {
    if (adds_residual(work)) {
      finish_parts<true>(work, sums);
    } else {
      finish_parts<false>(work, sums);
    }
  }

  // Shared memory must outlive the last stores.
  __device__ __forceinline__ void end() {
    if (threadIdx.x % 32 == 0) bulk_wait_read<0>();
  }

 private:
  __device__ __forceinline__ bool adds_residual(const HopperWork& work) const {
    return p_.has_residual && work.column < work.live;
  }

  // The warp's first row of a patch, counted from the tile's, and how many of its rows belong to the tile.
  __device__ __forceinline__ int first_row(int i) const { return (group_ * kPatches + i) * 64 + warp_ * 16; }
  __device__ __forceinline__ int rows(const HopperWork& work, int i) const {
    return max(0, min(layout_.rows(work) - first_row(i), 16));
  }

  template <bool kResidual>
  __device__ __forceinline__ void finish_parts(const HopperWork& work, const Sums& sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int number = 0; number < kPatches * kParts; ++number) {
      const int i = number / kParts, part = number % kParts;
      if (rows(work, i) == 0) continue;
      unsigned char* to = shared_.store(4 * group_ + warp_, buffer_);
      if (kResidual) {
        mbarrier_wait(&shared_.control->residual_full[4 * group_ + warp_][buffer_], parities_ >> buffer_ & 1);
        parities_ ^= 1u << buffer_;
      } else {
        if (lane == 0 && !TDC_PLANTED(HOPPER_NO_STORE_WAIT)) bulk_wait_read<Tile::kStoreBuffers - 1>();
        warp_sync();
      }
      round<kResidual>(work, sums[i], i, part, to);
      if (!TDC_PLANTED(HOPPER_NO_STORE_FENCE)) async_fence();
      warp_sync();
      if (lane == 0) store(work, i, part, to);
      if (kResidual) load_residual(work, number + Tile::kStoreBuffers, buffer_);
      buffer_ = buffer_ + 1 == Tile::kStoreBuffers ? 0 : buffer_ + 1;
    }
  }

  template <bool kResidual>
  __device__ __forceinline__ void round(const HopperWork& work, const float (&sums)[Tile::kColumns / 2], int i,
                                        int part, unsigned char* to) {
    const int lane = threadIdx.x % 32, channel = work.column + part * 64 + lane % 4 * 2;
    int samples[2] = {};
    if (p_.sample_bias) {
      for (int half = 0; half < 2; ++half) {
        const int sample = layout_.sample(work, first_row(i) + lane / 4 + 8 * half);
        samples[half] = min(sample, p_.routing.batch - 1);
      }
    }
    hopper_round<T, kResidual>(
        sums + part * 32, to, work.live - work.column - part * 64, work.depth == 0,
        [&](int column, float (&top)[2], float (&bottom)[2]) {
          const unsigned bias = shfl(bias_[part], column * 4 + lane % 4);
          hopper_add<T>(top, bias), hopper_add<T>(bottom, bias);
          if (!p_.sample_bias) return;
          const int at = channel + column * 8, channels = p_.result_channels;
          hopper_add<T>(top, hopper_pair_at<T>(p_.sample_bias, samples[0], at, channels, work.live));
          hopper_add<T>(bottom, hopper_pair_at<T>(p_.sample_bias, samples[1], at, channels, work.live));
        });
  }

  // Loads the residual of a part, counted through the patches, where the tile has so many. The buffer's last store must
  // have been read.
  __device__ __forceinline__ void load_residual(const HopperWork& work, int number, int buffer) {
    const int i = number / kParts;
    if (i >= kPatches || rows(work, i) == 0 || threadIdx.x % 32 != 0) return;
    if (!TDC_PLANTED(HOPPER_NO_RESIDUAL_WAIT)) bulk_wait_read<0>();
    Mbarrier* full = &shared_.control->residual_full[4 * group_ + warp_][buffer];
    mbarrier_arrive_expect(full, kHopperStoreBytes);
    layout_.load_residual(work, first_row(i), work.column + number % kParts * 64,
                          shared_.store(4 * group_ + warp_, buffer), full);
  }

  __device__ __forceinline__ void store(const HopperWork& work, int i, int part, const unsigned char* from) {
    layout_.store(work, first_row(i), rows(work, i), work.column + part * 64, from);
    bulk_commit();
  }

  const Params& p_;
  const Layout layout_;
  const HopperRowsShared<Tile>& shared_;
  int group_, warp_;
  int buffer_ = 0;
  unsigned parities_ = 0;  // of the residual's barriers
  unsigned bias_[kParts];  // of two channels: lane l has channels 2 l and 2 l + 1 of each part
};

}  // namespace tdc
