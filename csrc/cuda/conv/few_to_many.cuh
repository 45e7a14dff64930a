// Convolutions from few channels to many: the forward of a first layer and the dgrad of a last one. The result is
// written once, and all taps are one product.
//
//   rows       pixels of a run of one sample, 16 at a time
//   columns    channels of the result, 32 in each warp
//   depth      entries (tap, few channel), gathered from a patch of the source in shared memory
//
// A warp keeps its weights in registers. Its columns are permuted: what a lane has of a row of the product, columns
// 2q and 2q + 1 of four fragments, are 8 channels one after the other, so that it writes 16 bytes without a detour.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/few_patch.cuh"

namespace tdc {

template <class T, int kEntries>
class FewToMany {
  static constexpr int kSteps = kEntries / 16, kFragments = kFewWarpColumns / 8;

 public:
  __device__ __forceinline__ FewToMany(const ConvFewImageParams& p, unsigned char* shared)
      : p_(p), weights_at_(shared), patch_(p.geometry, shared + p.weight_bytes) {
    const ConvFewGeometry& g = p.geometry;
    const int lane = threadIdx.x % 32, warps = p.tile_channels / kFewWarpColumns, warp = threadIdx.x / 32;
    int block = blockIdx.x;
    warp_columns_ = warp % warps * kFewWarpColumns;
    first_channel_ = block % p.channel_tiles * p.tile_channels + warp_columns_;
    block /= p.channel_tiles;
    const int pixels = static_cast<int>(g.by_pixels.divisor);
    first_ = block % p.runs * p.run;
    sample_ = block / p.runs;
    end_ = min(first_ + p.run, pixels);
    row_ = warp / warps * 16, rows_apart_ = static_cast<int>(blockDim.x) / 32 / warps * 16;

    const int group = group_of_sample(p.routing, sample_);
    expert_ = expert_of_group(p.routing, group);
    const int in = live_width(p.routing.in_widths, group, p.dgrad ? g.many : g.few);
    const int out = live_width(p.routing.out_widths, group, p.dgrad ? g.few : g.many);
    live_few_ = p.dgrad ? out : in;
    live_many_ = p.dgrad ? in : out;
    entries_ = g.filter_height * g.filter_width * g.few;
    channel_ = first_channel_ + lane % 4 * 8;
  }

  __device__ __forceinline__ void run() {
    const ConvFewGeometry& g = p_.geometry;
    const int first_row = quotient(first_, g.by_width), rows = quotient(end_ - 1, g.by_width) - first_row + 1;
    load_weights();
    load_biases();
    patch_.load(static_cast<const T*>(p_.source), sample_, first_row, rows, live_few_, static_cast<int>(blockDim.x));
    if (!TDC_PLANTED(FEW_NO_BARRIER)) block_sync();
    if (first_channel_ >= g.many) return;
    take_weights();
    find_entries();
    const int before = first_row * g.width;
    for (int pixel = first_ + row_; pixel < end_; pixel += rows_apart_) compute(pixel, before);
  }

 private:
  // The entry that a lane has as the i-th of its four of a step.
  __device__ __forceinline__ static int entry_of(int step, int i) {
    return step * 16 + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
  }

  __device__ __forceinline__ void find_entries() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int entry = entry_of(step, i);
        if (entry < entries_) exists_ |= 1u << (step * 4 + i);
        distance_[step][i] = entry < entries_ ? few_distance(p_.geometry, entry, p_.dgrad) : 0;
      }
    }
  }

  // Brings the weights of the block's channels to shared memory, as lanes have them: of every warp of columns, step and
  // pair of fragments 16 bytes per lane.
  __device__ __forceinline__ void load_weights() {
    const ConvFewGeometry& g = p_.geometry;
    const int taps = g.filter_height * g.filter_width, first = first_channel_ - warp_columns_;
    const int count = p_.weight_bytes / 4;
    const T* weight = static_cast<const T*>(p_.weight) + static_cast<long long>(expert_) * entries_ * g.many;
    unsigned* words = reinterpret_cast<unsigned*>(weights_at_);
#pragma unroll 2
    for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) {
      const int half = i % 2, lane = i / 4 % 32, step = i / 256 % kSteps;
      const int j = i / 128 % 2 * 2 + i / 2 % 2, n = lane / 4;  // the fragment, and its column
      const int column = TDC_PLANTED(FEW_COLUMNS_IN_PLACE) ? j * 8 + n : n / 2 * 8 + j * 2 + n % 2;
      const int channel = first + i / 256 / kSteps * kFewWarpColumns + column;
      unsigned word = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int entry = step * 16 + lane % 4 * 2 + half * 8 + e, tap = quotient(entry, g.by_few);
        const int few = entry - tap * g.few;
        if (entry >= entries_ || few >= live_few_ || channel >= live_many_) continue;
        const long long place = p_.dgrad ? (static_cast<long long>(few) * taps + tap) * g.many + channel
                                         : static_cast<long long>(channel) * entries_ + entry;
        word |= static_cast<unsigned>(weight[place].bits) << e * 16;
      }
      words[i] = word;
    }
  }

  // The fragments of the warp's columns.
  __device__ __forceinline__ void take_weights() {
    const unsigned char* mine = weights_at_ + warp_columns_ * kEntries * 2 + threadIdx.x % 32 * 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kFragments; j += 2) {
        const uint4 pair = load_16(mine + (step * 2 + j / 2) * 512);
        weights_[step][j][0] = pair.x, weights_[step][j][1] = pair.y;
        weights_[step][j + 1][0] = pair.z, weights_[step][j + 1][1] = pair.w;
      }
    }
  }

  // The sums of the biases of the lane's channels, in which products are added up.
  __device__ __forceinline__ void load_biases() {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const int channel = channel_ + v;
      float sum = 0.0f;
      if (channel < live_many_) {
        const long long of_expert = static_cast<long long>(expert_) * p_.geometry.many + channel;
        const long long of_sample = static_cast<long long>(sample_) * p_.geometry.many + channel;
        if (p_.bias) sum += to_float(static_cast<const T*>(p_.bias)[of_expert]);
        if (p_.sample_bias) sum += to_float(static_cast<const T*>(p_.sample_bias)[of_sample]);
      }
      biases_[v] = sum;
    }
  }

  // Computes 16 pixels from `pixel` on; `before` is the first pixel of the patch.
  __device__ __forceinline__ void compute(int pixel, int before) {
    const int lane = threadIdx.x % 32, last = end_ - 1 - before;
    int places[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) places[i] = patch_.place(min(pixel - before + lane / 4 + i * 8, last));
    float sums[kFragments][4];
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[j][e] = biases_[j * 2 + e % 2];
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Elements of entries that do not exist are not used, whatever they are: only the last ones do not.
        const unsigned keep = (exists_ >> (step * 4 + half * 2) & 1 ? 0xffffu : 0u) |
                              (exists_ >> (step * 4 + half * 2 + 1) & 1 ? 0xffff0000u : 0u);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned first = patch_.at(places[i] + distance_[step][half * 2]);
          const unsigned second = patch_.at(places[i] + distance_[step][half * 2 + 1]);
          a[half * 2 + i] = (first | second << 16) & keep;
        }
      }
#pragma unroll
      for (int j = 0; j < kFragments; ++j) mma_16x8x16(sums[j], a, weights_[step][j], T());
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = pixel + lane / 4 + i * 8;
      if (at < end_ && channel_ < p_.geometry.many) {
        const float values[8] = {sums[0][i * 2], sums[0][i * 2 + 1], sums[1][i * 2], sums[1][i * 2 + 1],
                                 sums[2][i * 2], sums[2][i * 2 + 1], sums[3][i * 2], sums[3][i * 2 + 1]};
        store(at, values);
      }
    }
  }

  __device__ __forceinline__ void store(int pixel, const float (&sums)[8]) {
    const ConvFewGeometry& g = p_.geometry;
    const long long place = (static_cast<long long>(sample_) * g.by_pixels.divisor + pixel) * g.many + channel_;
    float values[8];
#pragma unroll
    for (int v = 0; v < 8; ++v) values[v] = sums[v];
    if (p_.residual) add_chunk(values, static_cast<const T*>(p_.residual) + place, 8, true);
    if (channel_ + 8 > live_many_) {
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        if (channel_ + v >= live_many_) values[v] = 0.0f;
      }
    }
    store_chunk(static_cast<T*>(p_.result) + place, values, 8, true);
  }

  const ConvFewImageParams& p_;
  unsigned char* weights_at_;  // in shared memory
  FewPatch<T> patch_;
  int warp_columns_;             // of the block's channels, where the warp's begin
  int sample_, first_, end_;     // the run
  int first_channel_, channel_;  // of the warp, of the lane's chunk
  int row_, rows_apart_;         // pixels of the run that a warp computes
  int expert_, live_few_, live_many_, entries_;
  int distance_[kSteps][4];
  unsigned exists_ = 0;  // bit step * 4 + i: the lane's entry exists
  unsigned weights_[kSteps][kFragments][2];
  float biases_[8];
};

template <class T, int kEntries>
__device__ __forceinline__ void conv_few_to_many(const ConvFewImageParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  FewToMany<T, kEntries>(p, shared).run();
}

}  // namespace tdc
