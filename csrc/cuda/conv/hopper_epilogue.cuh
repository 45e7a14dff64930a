// The epilogue of the Hopper form of images: the rows of a warp are two lines of a patch, which TMA clips at the edges
// of the image.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_epilogue_base.cuh"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_shared.cuh"

namespace tdc {

template <class T, class Tile>
class HopperEpilogue
    : public HopperEpilogueBase<HopperEpilogue<T, Tile>, T, Tile, ConvHopperParams, HopperShared<Tile>> {
  using Base = HopperEpilogueBase<HopperEpilogue, T, Tile, ConvHopperParams, HopperShared<Tile>>;
  friend Base;
  using Base::p_, Base::group_, Base::kParts;
  static constexpr int kPerSample = Tile::kDown * Tile::kAcross;  // patches
  static constexpr int kSamples = Base::kPatches < kPerSample ? 1 : Base::kPatches / kPerSample;
  static constexpr bool kEarly = Tile::kRegistersOfSums <= 128;  // there are registers to hold the biases meanwhile

 public:
  __device__ __forceinline__ HopperEpilogue(const ConvHopperParams& p, const HopperShared<Tile>& shared, int group)
      : Base(p, shared, group) {}

 private:
  __device__ __forceinline__ bool has_rows(const HopperWork& work, int i) const {
    return HopperPatch::of<Tile>(group_, i).sample < work.count;
  }

  __device__ __forceinline__ void load_biases(const HopperWork& work) {
    this->load_bias(work);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        const int sample = min(work.first + HopperPatch::of<Tile>(group_, s * kPerSample).sample, p_.routing.batch - 1);
        sample_bias_[s][part] =
            hopper_pair_at<T>(p_.sample_bias, sample, Base::own_channel(work, part), p_.result_channels, work.live);
      }
    }
  }

  __device__ __forceinline__ auto sample_bias(const HopperWork&, int i, int part) const {
    const int sample = kSamples == 1 ? 0 : i / kPerSample;
    return [this, sample, part](int column, float (&top)[2], float (&bottom)[2]) {
      const unsigned of_sample = shfl(sample_bias_[sample][part], column * 4 + threadIdx.x % 4);
      hopper_add<T>(top, of_sample), hopper_add<T>(bottom, of_sample);
    };
  }

  __device__ __forceinline__ void load_box(const HopperWork& work, int i, int channel, void* to, Mbarrier* full) const {
    int at[4];
    place(work, i, channel, at);
    tma_load(to, &p_.residual, full, at);
  }

  __device__ __forceinline__ void store_box(const HopperWork& work, int i, int channel, const void* from) const {
    const bool second = work.column >= p_.result_seam;
    if (channel >= (second ? p_.result_channels : p_.result_seam)) return;
    int at[4];
    place(work, i, channel - (second ? p_.result_seam : 0), at);
    tma_store(second ? &p_.result2 : &p_.result, from, at);
  }

  // Where the warp's part of a patch lies in the result.
  __device__ __forceinline__ void place(const HopperWork& work, int i, int channel, int (&at)[4]) const {
    const HopperPatch patch = HopperPatch::of<Tile>(group_, i);
    at[0] = channel;
    at[1] = work.x + patch.x;
    at[2] = work.y + patch.y + 2 * this->warp_;
    at[3] = work.first + patch.sample;
  }

  unsigned sample_bias_[kSamples][kParts];  // as Base::bias_, of the warpgroup's samples
};

}  // namespace tdc
