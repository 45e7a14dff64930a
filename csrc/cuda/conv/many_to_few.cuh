// Convolutions from many channels to few: the forward of a last layer and the dgrad of a first one. Each pixel of the
// source is multiplied once, by the weights of all taps; the result adds up products of its neighbours.
//
//   products   of pixel x entry (tap, few channel): rows are pixels, which lanes load from memory straight into
//              fragments, 16 bytes each; the depth is the many channels
//   ring       products of the last pixels in shared memory, fp32: a step of the block adds kFewStep pixels to it
//   result     pixels whose neighbours are in the ring: one product per tap, the biases, the residual
//
// The depth is permuted so that the 8 channels that a lane loads are what it has of two fragments.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/few_patch.cuh"

namespace tdc {

template <class T, int kEntries>
class ManyToFew {
  static constexpr int kFragments = kEntries / 8;
  static constexpr int kAhead = 4;  // blocks of 32 channels that are loaded at once

 public:
  __device__ __forceinline__ ManyToFew(const ConvFewImageParams& p, unsigned char* shared)
      : p_(p), weights_(shared), ring_(reinterpret_cast<float*>(shared + p.weight_bytes)) {
    const ConvFewGeometry& g = p.geometry;
    const int pixels = static_cast<int>(g.by_pixels.divisor);
    first_ = blockIdx.x % p.runs * p.run;
    end_ = min(first_ + p.run, pixels);
    sample_ = blockIdx.x / p.runs;
    const int group = group_of_sample(p.routing, sample_);
    expert_ = expert_of_group(p.routing, group);
    const int in = live_width(p.routing.in_widths, group, p.dgrad ? g.few : g.many);
    const int out = live_width(p.routing.out_widths, group, p.dgrad ? g.many : g.few);
    live_few_ = p.dgrad ? in : out;
    live_many_ = p.dgrad ? out : in;
    taps_ = g.filter_height * g.filter_width;
    entries_ = taps_ * g.few;
    reach_ = g.filter_height / 2 * g.width + g.filter_width / 2;
    source_ = static_cast<const T*>(p.source) + static_cast<long long>(sample_) * pixels * g.many;
  }

  __device__ __forceinline__ void run() {
    const int pixels = static_cast<int>(p_.geometry.by_pixels.divisor);
    const int begin = max(0, first_ - reach_), end = min(pixels, end_ + reach_);
    load_weights();
    load(begin, end, 0);
    block_sync();
    int written = first_;
    for (int pixel = begin; pixel < end; pixel += kFewStep) {
      multiply(pixel, end);
      if (!TDC_PLANTED(FEW_NO_BARRIER)) block_sync();
      const int known = min(pixel + kFewStep, end);
      const int ready = known == end ? end_ : known - (TDC_PLANTED(FEW_TOO_EARLY) ? reach_ - 1 : reach_);
      if (ready > written) {
        add_up(written, min(ready, end_));
        written = min(ready, end_);
      }
    }
  }

 private:
  // A lane's fragments of the weights: 8 channels of one entry, for two steps of depth.
  __device__ __forceinline__ unsigned char* weights_at(int block, int fragment, int lane) const {
    return weights_ + ((block * kFragments + fragment) * 32 + lane) * 16;
  }

  __device__ __forceinline__ void load_weights() {
    const ConvFewGeometry& g = p_.geometry;
    const T* weight = static_cast<const T*>(p_.weight) + static_cast<long long>(expert_) * entries_ * g.many;
    const int count = (g.many + 31) / 32 * kFragments * 32;
    for (int i = threadIdx.x; i < count; i += kFewMostThreads) {
      const int lane = i % 32, fragment = i / 32 % kFragments, block = i / 32 / kFragments;
      const int entry = fragment * 8 + lane / 4, channel = block * 32 + lane % 4 * 8;
      const int tap = quotient(entry, g.by_few), few = entry - tap * g.few;
      unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        if (entry < entries_ && few < live_few_ && channel + v < live_many_) {
          const long long place = p_.dgrad ? static_cast<long long>(channel + v) * entries_ + entry
                                           : (static_cast<long long>(few) * taps_ + tap) * g.many + channel + v;
          words[v / 2] |= static_cast<unsigned>(weight[place].bits) << v % 2 * 16;
        }
      }
      store_16(weights_at(block, fragment, lane), make_uint4(words[0], words[1], words[2], words[3]));
    }
  }

  // Loads a lane's part of the pixels of its warp, kAhead blocks of 32 channels from `block` on.
  __device__ __forceinline__ void load(int pixel, int end, int block) {
    const ConvFewGeometry& g = p_.geometry;
    const int lane = threadIdx.x % 32, row = pixel + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int channel = (block + k) * 32 + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool exists = row + i * 8 < end && channel < live_many_;
        const T* from = source_ + (static_cast<long long>(row + i * 8) * g.many + channel);
        loaded_[k][i] = exists ? load_16(from) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // The first `live` elements of a chunk, zeros after them.
  __device__ __forceinline__ static void keep(uint4& chunk, int live) {
    unsigned* words[4] = {&chunk.x, &chunk.y, &chunk.z, &chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) *words[i] &= live >= 2 * i + 2 ? 0xffffffffu : live == 2 * i + 1 ? 0xffffu : 0u;
  }

  // The products of kFewStep pixels from `pixel` on, of which those from `end` on do not exist.
  __device__ __forceinline__ void multiply(int pixel, int end) {
    const int lane = threadIdx.x % 32, blocks = (p_.geometry.many + 31) / 32;
    float sums[kFragments][4] = {};
    for (int block = 0; block < blocks; block += kAhead) {
      if (block > 0) load(pixel, end, block);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (block + k >= blocks) break;
        uint4 top = loaded_[k][0], bottom = loaded_[k][1];
        if (live_many_ % 8 != 0 && !TDC_PLANTED(FEW_KEEPS_DEAD)) {
          const int live = live_many_ - (block + k) * 32 - lane % 4 * 8;
          keep(top, live);
          keep(bottom, live);
        }
        const unsigned a[2][4] = {{top.x, bottom.x, top.y, bottom.y}, {top.z, bottom.z, top.w, bottom.w}};
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
          if (j * 8 >= entries_) break;
          const uint4 b = load_16(weights_at(block + k, j, lane));
          const unsigned first[2] = {b.x, b.y}, second[2] = {b.z, b.w};
          mma_16x8x16(sums[j], a[0], first, T());
          mma_16x8x16(sums[j], a[1], second, T());
        }
      }
    }
    load(pixel + kFewStep, end, 0);

    const int row = pixel + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + i * 8 >= end) continue;
      float* products = ring_ + (row + i * 8) % p_.ring * p_.ring_pitch + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        if (j * 8 + lane % 4 * 2 < p_.ring_pitch) {
          *reinterpret_cast<float2*>(products + j * 8) = make_float2(sums[j][i * 2], sums[j][i * 2 + 1]);
        }
      }
    }
  }

  // Writes the pixels of the result from `first` to `end`.
  __device__ __forceinline__ void add_up(int first, int end) {
    const ConvFewGeometry& g = p_.geometry;
    const int pixels = static_cast<int>(g.by_pixels.divisor), up = g.filter_height / 2, left = g.filter_width / 2;
    for (int i = threadIdx.x; i < (end - first) * g.few; i += kFewMostThreads) {
      const int pixel = first + quotient(i, g.by_few), few = i - (pixel - first) * g.few;
      const int row = quotient(pixel, g.by_width), column = pixel - row * g.width, at = pixel % p_.ring;
      float sum = 0.0f;
      for (int r = 0; r < g.filter_height; ++r) {
        const int down = p_.dgrad ? up - r : r - up;
        if (static_cast<unsigned>(row + down) >= static_cast<unsigned>(g.height)) continue;
        for (int s = 0; s < g.filter_width; ++s) {
          const int right = p_.dgrad && !TDC_PLANTED(FEW_NOT_FLIPPED) ? left - s : s - left;
          if (static_cast<unsigned>(column + right) >= static_cast<unsigned>(g.width)) continue;
          int other = at + down * g.width + right;
          other += other < 0 ? p_.ring : other >= p_.ring ? -p_.ring : 0;
          sum += ring_[other * p_.ring_pitch + (r * g.filter_width + s) * g.few + few];
        }
      }
      const long long place = (static_cast<long long>(sample_) * pixels + pixel) * g.few + few;
      if (p_.bias) sum += to_float(static_cast<const T*>(p_.bias)[expert_ * g.few + few]);
      if (p_.sample_bias) sum += to_float(static_cast<const T*>(p_.sample_bias)[sample_ * g.few + few]);
      if (p_.residual) sum += to_float(static_cast<const T*>(p_.residual)[place]);
      static_cast<T*>(p_.result)[place] = from_float<T>(few < live_few_ ? sum : 0.0f);
    }
  }

  const ConvFewImageParams& p_;
  unsigned char* weights_;
  float* ring_;
  const T* source_;           // of the sample
  int sample_, first_, end_;  // the run
  int expert_, live_few_, live_many_, taps_, entries_;
  int reach_;  // pixels between one of the result and the farthest one that it needs
  uint4 loaded_[kAhead][2];
};

template <class T, int kEntries>
__device__ __forceinline__ void conv_many_to_few(const ConvFewImageParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  ManyToFew<T, kEntries>(p, shared).run();
}

}  // namespace tdc
