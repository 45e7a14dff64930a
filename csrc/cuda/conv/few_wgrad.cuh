// wgrad of layers with few channels on one side: sums[entry, channel] = sum over pixels of few[pixel + tap, c]
// many[pixel, channel], for all taps at once, so that the many are read once.
//
//   rows of the product    entries (tap, few channel), gathered from a patch of the few in shared memory
//   columns                channels of the many, a tile of at most kFewColumns in each block
//   depth                  pixels
//
// The pixels of the batch, group after group, are cut into equal shares, whatever the sizes of the groups. A block
// writes what it sums of a group to a slot of its own, share + group: where either grows, so does the slot. A second
// launch adds the slots of an expert in order.
//
// dbias comes out of the same products: where the few are x, from an entry whose elements are ones, and where they are
// dy, from a column of ones, of which the entries of the middle tap are the sums.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/few_patch.cuh"
#include "cuda/conv/pipeline.cuh"

namespace tdc {

__device__ __forceinline__ int few_share_begin(const ConvFewWgradParams& p, int share) {
  return static_cast<int>(static_cast<long long>(p.units) * share / p.shares) * kConvDepth;
}
// The share that has a pixel: the last that begins at or before it.
__device__ __forceinline__ int few_share_of(const ConvFewWgradParams& p, int pixel) {
  return static_cast<int>((static_cast<long long>(pixel / kConvDepth + 1) * p.shares - 1) / p.units);
}

template <class T, int kEntries>
class FewWgrad {
  static constexpr int kThreads = few_wgrad_threads(kEntries), kWarpColumns = 64, kFragments = kWarpColumns / 8;
  static constexpr int kStageBytes = kConvDepth * kFewColumns * 2;
  using Many = DepthOuter<T, kFewColumns>;
  using Share = CopyShare<Many, kThreads>;
  static_assert(Many::kBytes == kStageBytes, "the host asks for what is used");

 public:
  __device__ __forceinline__ FewWgrad(const ConvFewWgradParams& p, unsigned char* shared)
      : p_(p), stages_(shared), places_(shared + kFewStages * kStageBytes),
        patch_(p.geometry, shared + kFewStages * kStageBytes + p.table_bytes) {
    first_channel_ = blockIdx.x % p.channel_tiles * p.tile_channels;
    end_channel_ = min(first_channel_ + p.tile_channels, p.geometry.many);
    const int warp = threadIdx.x / 32, entries = p.geometry.filter_height * p.geometry.filter_width * p.geometry.few;
    first_entry_ = warp / 2 * 16;
    first_column_ = warp % 2 * kWarpColumns;
    sums_bias_ = p.few_outputs && p.dbias && first_channel_ == 0 && first_column_ == 0;
    for (int i = 0; i < 2; ++i) {
      const int entry = first_entry_ + threadIdx.x % 32 / 4 + i * 8;
      const bool exists = entry < entries;
      const bool is_one = entry == entries && !p.few_outputs && p.dbias;
      distance_[i] = exists ? few_distance(p.geometry, entry, p.few_outputs) : 0;
      keep_[i] = exists ? 0xffffffffu : 0u;
      ones_[i] = is_one ? from_float<T>(1.0f).bits * 0x10001u : 0u;
    }
  }

  // Sums a share and writes it.
  __device__ __forceinline__ void run() {
    const ConvFewGeometry& g = p_.geometry;
    const int share = blockIdx.x / p_.channel_tiles, pixels = static_cast<int>(g.by_pixels.divisor);
    const int end = min(few_share_begin(p_, share + 1), p_.routing.batch * pixels);
    int group = -1;
    for (int pixel = few_share_begin(p_, share); pixel < end;) {
      const int sample = quotient(pixel, g.by_pixels), before = sample * pixels;
      const int found = group_of_sample(p_.routing, sample);
      if (found != group && group >= 0) store(share, group);
      group = found;
      const int row = quotient(pixel - before, g.by_width);
      const int past = min(end, before + min(pixels, (row + g.band) * g.width));
      add_pixels(group, sample, row, pixel - before, past - before);
      pixel = past;
    }
    if (group >= 0) store(share, group);
  }

 private:
  // Adds the pixels from `first` to `end` of a sample, of which `first` is in `first_row`.
  __device__ __forceinline__ void add_pixels(int group, int sample, int first_row, int first, int end) {
    const ConvFewGeometry& g = p_.geometry;
    const int in = live_width(p_.routing.in_widths, group, p_.few_outputs ? g.many : g.few);
    const int out = live_width(p_.routing.out_widths, group, p_.few_outputs ? g.few : g.many);
    live_ = min(end_channel_, p_.few_outputs ? in : out);
    source_ = static_cast<const T*>(p_.many) + static_cast<long long>(sample) * g.by_pixels.divisor * g.many;
    pixel_ = first, end_ = end;
    const int before = first_row * g.width, steps = (end - first + kConvDepth - 1) / kConvDepth;
#pragma unroll
    for (int stage = 0; stage < kFewStages - 1; ++stage) load(stage);
    const int rows = quotient(end - 1, g.by_width) - first_row + 1;
    patch_.load(static_cast<const T*>(p_.few), sample, first_row, rows, p_.few_outputs ? out : in, kThreads);
    // A table of where the pixels lie in the patch, in whole stages.
    for (int i = threadIdx.x; i < steps * kConvDepth; i += kThreads) {
      reinterpret_cast<unsigned short*>(places_)[i] =
          static_cast<unsigned short>(patch_.place(min(first - before + i, end - 1 - before)));
    }
    int oldest = 0, next = kFewStages - 1;
    for (int step = 0; step < steps; ++step) {
      if (!TDC_PLANTED(FEW_NO_WAIT)) cp_async_wait<kFewStages - 2>();
      if (!TDC_PLANTED(FEW_NO_BARRIER)) block_sync();
      load(next);
      if (first_channel_ + first_column_ < end_channel_) {
        multiply(stages_ + oldest * kStageBytes, step * kConvDepth, end - first);
      }
      oldest = oldest + 1 == kFewStages ? 0 : oldest + 1;
      next = next + 1 == kFewStages ? 0 : next + 1;
    }
    cp_async_wait<0>();
    block_sync();
  }

  // Copies the next pixels of the many into a stage.
  __device__ __forceinline__ void load(int stage) {
    const int channel = first_channel_ + Share::chunk() * kPerChunk<T>;
    const T* from[Share::kCopies];
    unsigned exists = 0;
#pragma unroll
    for (int i = 0; i < Share::kCopies; ++i) {
      const int pixel = pixel_ + Share::line(i);
      from[i] = source_ + (static_cast<long long>(pixel) * p_.geometry.many + channel);
      exists |= pixel < end_ ? 1u << i : 0u;
    }
    if (pixel_ < end_) {
      copy_share<Share, true>(stages_ + stage * kStageBytes, source_, from, exists, live_ - channel);
    }
    cp_async_commit();
    pixel_ += kConvDepth;
  }

  // `pixel` is the stage's first one, counted from the run's; those from `end` on do not exist.
  __device__ __forceinline__ void multiply(const unsigned char* stage, int pixel, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kConvDepth / 16; ++step) {
      unsigned a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = pixel + step * 16 + half * 8 + lane % 4 * 2;
        const unsigned pair = *reinterpret_cast<const unsigned*>(places_ + first * 2);
        const int low = static_cast<int>(pair & 0xffffu), high = static_cast<int>(pair >> 16);
        const unsigned exist = first + 1 < end ? 0xffffffffu : first < end ? 0xffffu : 0u;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned elements = patch_.at(low + distance_[i]) | patch_.at(high + distance_[i]) << 16;
          a[half * 2 + i] = (elements & exist & keep_[i]) | ones_[i];
        }
      }
#pragma unroll
      for (int j = 0; j < kFragments; j += 2) {
        unsigned pair[4];
        Many::load(pair, stage, first_column_ + j * 8, step, lane);
        const unsigned left[2] = {pair[0], pair[2]}, right[2] = {pair[1], pair[3]};
        mma_16x8x16(sums_[j], a, left, T());
        mma_16x8x16(sums_[j + 1], a, right, T());
      }
      if (sums_bias_) {
        const unsigned one = from_float<T>(1.0f).bits * 0x10001u, ones[2] = {one, one};
        mma_16x8x16(bias_, a, ones, T());
      }
    }
  }

  // Writes the sums of a group to its slot and clears them.
  __device__ __forceinline__ void store(int share, int group) {
    const ConvFewGeometry& g = p_.geometry;
    const int slot = share + (TDC_PLANTED(FEW_ONE_SLOT) ? 0 : group);
    const int lane = threadIdx.x % 32, row = first_entry_ + lane / 4;
    const int in_tap = g.filter_height * g.filter_width / 2 * g.few;  // the middle one
    float* partial = p_.partials + static_cast<long long>(slot) * p_.entries * g.many;
    const int products = p_.entries - (p_.few_outputs && p_.dbias ? 1 : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int entry = row + i * 8;
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        const int channel = first_channel_ + first_column_ + j * 8 + lane % 4 * 2;
        if (entry < products && channel < end_channel_) {
          *reinterpret_cast<float2*>(partial + static_cast<long long>(entry) * g.many + channel) =
              make_float2(sums_[j][i * 2], sums_[j][i * 2 + 1]);
        }
        sums_[j][i * 2] = sums_[j][i * 2 + 1] = 0.0f;
      }
      if (sums_bias_ && lane % 4 == 0 && entry >= in_tap && entry < in_tap + g.few) {
        partial[static_cast<long long>(products) * g.many + entry - in_tap] = bias_[i * 2];
      }
      bias_[i * 2] = bias_[i * 2 + 1] = 0.0f;
    }
  }

  const ConvFewWgradParams& p_;
  unsigned char* stages_;
  unsigned char* places_;  // 16 bits each
  FewPatch<T> patch_;
  int first_channel_, end_channel_;  // of the tile
  int first_entry_, first_column_;   // of the warp in the tile
  bool sums_bias_;                   // with a column of ones
  int distance_[2];                  // of the thread's entries
  unsigned keep_[2], ones_[2];       // 0: there is no such entry; a pair of ones: the entry for the bias
  // The run of pixels:
  const T* source_ = nullptr;           // of the sample
  int pixel_ = 0, end_ = 0, live_ = 0;  // the next to be loaded; past the last; past the last live channel
  float sums_[kFragments][4] = {}, bias_[4] = {};
};

template <class T, int kEntries>
__device__ __forceinline__ void conv_few_wgrad(const ConvFewWgradParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  FewWgrad<T, kEntries>(p, shared).run();
}

// dweight and dbias: a block adds the slots of an expert for 32 channels of an entry, a warp every eighth of them.
template <class T>
__device__ __forceinline__ void conv_few_reduce(const ConvFewWgradParams& p) {
  constexpr int kWarps = kFewReduceThreads / 32;
  TDC_SHARED(float, of_warps, kFewReduceThreads);
  const ConvFewGeometry& g = p.geometry;
  const int taps = g.filter_height * g.filter_width, tiles = (g.many + 31) / 32, warp = threadIdx.x / 32;
  const int channel = blockIdx.x % tiles * 32 + threadIdx.x % 32, entry = blockIdx.x / tiles % p.entries;
  const int expert = blockIdx.x / tiles / p.entries, pixels = static_cast<int>(g.by_pixels.divisor);
  const bool of_bias = entry == taps * g.few;
  const bool exists = channel < (of_bias && p.few_outputs ? g.few : g.many);

  float sum = 0.0f;
  for (int group = 0; group < p.routing.num_groups; ++group) {
    if (expert_of_group(p.routing, group) != expert) continue;
    const int first = clamp_to(p.routing.offsets[group], p.routing.batch) * pixels;
    const int past = clamp_to(p.routing.offsets[group + 1], p.routing.batch) * pixels;
    if (first >= past || !exists) continue;
    const int last = few_share_of(p, past - 1);
#pragma unroll 4
    for (int share = few_share_of(p, first) + warp; share <= last; share += kWarps) {
      sum += p.partials[(static_cast<long long>(share + group) * p.entries + entry) * g.many + channel];
    }
  }
  of_warps[threadIdx.x] = sum;
  block_sync();
  if (warp != 0 || !exists) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += of_warps[i * 32 + threadIdx.x];

  const T rounded = from_float<T>(sum);
  if (of_bias) {
    static_cast<T*>(p.dbias)[static_cast<long long>(expert) * (p.few_outputs ? g.few : g.many) + channel] = rounded;
  } else {
    const int tap = quotient(entry, g.by_few), few = entry - tap * g.few;
    const int out = p.few_outputs ? few : channel, in = p.few_outputs ? channel : few;
    const int outs = p.few_outputs ? g.few : g.many, ins = p.few_outputs ? g.many : g.few;
    static_cast<T*>(p.dweight)[((static_cast<long long>(expert) * outs + out) * taps + tap) * ins + in] = rounded;
  }
}

}  // namespace tdc
