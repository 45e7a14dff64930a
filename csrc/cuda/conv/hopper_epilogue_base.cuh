// The epilogue of the Hopper forms: bias, sample bias and residual are added in fp32, dead channels become zeros, and
// each warp stores its 16 rows of a patch, 64 channels at a time, by TMA.
//
// The residual takes the same way backwards: TMA brings its box into the store buffer before the sums are ready.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_shared.cuh"

namespace tdc {

// Two neighbouring elements of a row of `channels`; zeros past `live`.
template <class T>
__device__ __forceinline__ unsigned hopper_pair_at(const void* base, int row, int channel, int channels, int live) {
  if (!base || channel >= live) return 0;
  const T* at = static_cast<const T*>(base) + static_cast<long long>(row) * channels + channel;
  return __ldg(reinterpret_cast<const unsigned*>(at));
}

template <class T>
__device__ __forceinline__ void hopper_add(float (&to)[2], unsigned pair) {
  to[0] += to_float(T{static_cast<unsigned short>(pair & 0xffffu)});
  to[1] += to_float(T{static_cast<unsigned short>(pair >> 16)});
}

// Rounds a warp's sums of 16 rows and 64 channels into a store buffer, which holds the residual where there is one.
// `add(column, top, bottom)` adds to columns 8 * column + 2 * (lane % 4) and the next of rows lane / 4 and lane / 4
// + 8. Of the channels `live` are live.
template <class T, bool kResidual, class Add>
__device__ __forceinline__ void hopper_round(const float* sums, unsigned char* to, int live, Add add) {
  const int lane = threadIdx.x % 32, row = lane % 16;
  const int first = row * 128 + (lane / 16 ^ row % 8) * 16;  // the lane's chunk; one number spares registers
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    unsigned char* matrix = to + (first ^ 32 * j);
    unsigned own[4] = {0, 0, 0, 0}, rounded[4];
    if (kResidual) ldmatrix_x4(own, matrix);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = 2 * j + h;
      const float* own_sums = sums + column * 4;
      float top[2] = {own_sums[0], own_sums[1]}, bottom[2] = {own_sums[2], own_sums[3]};
      add(column, top, bottom);
      if (kResidual) hopper_add<T>(top, own[2 * h]), hopper_add<T>(bottom, own[2 * h + 1]);
      if (live < 64) {
        const int dead = column * 8 + lane % 4 * 2 - live;  // channels past the width
        if (dead >= 0) top[0] = bottom[0] = 0.0f;
        if (dead >= -1) top[1] = bottom[1] = 0.0f;
      }
      rounded[2 * h] = pack<T>(top[0], top[1]);
      rounded[2 * h + 1] = pack<T>(bottom[0], bottom[1]);
    }
    stmatrix_x4(matrix, rounded);
  }
}

// What the forms have in common. Own is the class of a form, which derives from this and says where a warp's rows lie:
//
//   kEarly                                 whether biases are loaded while the products are made
//   load_biases(work)                      load_bias and what else is to be loaded before the sums are rounded
//   has_rows(work, i)                      whether the tile has rows of the warp in the i-th patch of its warpgroup
//   sample_bias(work, i, part)             add(column, top, bottom) as in hopper_round, where there is a sample bias
//   load_box(work, i, channel, to, full)   begins to load the residual of the warp's rows, 64 channels from one on
//   store_box(work, i, channel, from)      begins to store them
template <class Own, class T, class Tile, class Params, class Shared>
class HopperEpilogueBase {
 public:
  static constexpr int kPatches = Tile::kPatches / 2, kParts = Tile::kColumns / 64;  // parts: 64 channels
  using Sums = float[kPatches][Tile::kColumns / 2];

  // Begins to load what is added to a tile, so that it arrives while the products are made.
  __device__ __forceinline__ void prepare(const HopperWork& work) {
    if (Own::kEarly) own().load_biases(work);
    if (!adds_residual(work)) return;
    for (int i = 0; i < Tile::kStoreBuffers; ++i) load_residual(work, i, (buffer_ + i) % Tile::kStoreBuffers);
  }

  __device__ __forceinline__ void finish(const HopperWork& work, Sums& sums) {
    if (work.depth == 0 && !TDC_PLANTED(HOPPER_OLD_SUMS)) {  // nothing was multiplied
      wgmma_wait<0>();  // there are none: without it ptxas waits for every product before the next (C7515)
#pragma unroll
      for (int i = 0; i < kPatches; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kColumns / 2; ++j) sums[i][j] = 0.0f;
      }
    }
    if (!Own::kEarly) own().load_biases(work);
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

 protected:
  __device__ __forceinline__ HopperEpilogueBase(const Params& p, const Shared& shared, int group)
      : p_(p), shared_(shared), group_(group), warp_(shfl(static_cast<int>(threadIdx.x) / 32 % 4, 0)) {}

  // Of the i-th part, the first of the two channels whose biases the lane holds.
  __device__ __forceinline__ static int own_channel(const HopperWork& work, int part) {
    return work.column + 64 * part + threadIdx.x * 2 % 64;
  }
  __device__ __forceinline__ void load_bias(const HopperWork& work) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      bias_[part] = hopper_pair_at<T>(p_.bias, work.expert, own_channel(work, part), p_.result_channels, work.live);
    }
  }

  const Params& p_;
  const Shared& shared_;
  int group_, warp_;

 private:
  __device__ __forceinline__ Own& own() { return static_cast<Own&>(*this); }

  __device__ __forceinline__ bool adds_residual(const HopperWork& work) const {
    return p_.has_residual && work.column < work.live;
  }

  template <bool kResidual>
  __device__ __forceinline__ void finish_parts(const HopperWork& work, const Sums& sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int number = 0; number < kPatches * kParts; ++number) {
      const int i = number / kParts, part = number % kParts;
      if (!own().has_rows(work, i)) continue;
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
      if (lane == 0) {
        own().store_box(work, i, work.column + 64 * part, to);
        bulk_commit();
      }
      if (kResidual) load_residual(work, number + Tile::kStoreBuffers, buffer_);
      buffer_ = buffer_ + 1 == Tile::kStoreBuffers ? 0 : buffer_ + 1;
    }
  }

  template <bool kResidual>
  __device__ __forceinline__ void round(const HopperWork& work, const float (&sums)[Tile::kColumns / 2], int i,
                                        int part, unsigned char* to) {
    const int lane = threadIdx.x % 32;
    const auto add_sample_bias = own().sample_bias(work, i, part);
    hopper_round<T, kResidual>(sums + part * 32, to, work.live - work.column - part * 64,
                               [&](int column, float (&top)[2], float (&bottom)[2]) {
                                 const unsigned bias = shfl(bias_[part], column * 4 + lane % 4);
                                 hopper_add<T>(top, bias), hopper_add<T>(bottom, bias);
                                 if (p_.sample_bias) add_sample_bias(column, top, bottom);
                               });
  }

  // Loads the residual of a part, counted through the patches, where the tile has so many. The buffer's last store must
  // have been read.
  __device__ __forceinline__ void load_residual(const HopperWork& work, int number, int buffer) {
    const int i = number / kParts;
    if (i >= kPatches || !own().has_rows(work, i) || threadIdx.x % 32 != 0) return;
    if (!TDC_PLANTED(HOPPER_NO_RESIDUAL_WAIT)) bulk_wait_read<0>();
    Mbarrier* full = &shared_.control->residual_full[4 * group_ + warp_][buffer];
    mbarrier_arrive_expect(full, kHopperStoreBytes);
    own().load_box(work, i, work.column + number % kParts * 64, shared_.store(4 * group_ + warp_, buffer), full);
  }

  int buffer_ = 0;
  unsigned parities_ = 0;  // of the residual's barriers
  unsigned bias_[kParts];  // of two channels: lane l has channels 2 l and 2 l + 1 of each part
};

}  // namespace tdc
