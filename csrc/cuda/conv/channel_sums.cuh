// dsample_bias and dbias: sums of dy over the pixels of each sample, and sums of those over the samples of each
// expert. The order of the fp32 additions is fixed, so the result never depends on timing.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

// A block that sums pixels for kAcross chunks of channels: adjacent threads read those of a pixel, and rows of threads
// share the pixels.
template <class T, int kThreads, int kAcross>
struct ConvSumBlock {
  static constexpr int kRows = kThreads / kAcross, kChannels = kAcross * kPerChunk<T>;
  static constexpr int kBytes = kRows * kChannels * static_cast<int>(sizeof(float));

  // The first channel of a thread's chunk.
  static __device__ __forceinline__ int channel() { return threadIdx.x % kAcross * kPerChunk<T>; }

  // Adds the pixels from `first` to `end` of the thread's row; `source` is pixel 0 of its chunk, of which `live`
  // channels are kept; `vector`: chunks may be loaded whole.
  static __device__ __forceinline__ void add_pixels(float (&sums)[kPerChunk<T>], const T* source, int channels,
                                                    int first, int end, int live, bool vector) {
    if (live <= 0) return;
#pragma unroll 2
    for (int pixel = first + threadIdx.x / kAcross; pixel < end; pixel += kRows) {
      add_chunk(sums, source + static_cast<long long>(pixel) * channels, live, vector && live >= kPerChunk<T>);
    }
  }

  // rows[c] = the sum of channel c of the block over all rows of threads, in a fixed order. `rows` has kBytes.
  static __device__ __forceinline__ void reduce(const float (&sums)[kPerChunk<T>], float* rows) {
#pragma unroll
    for (int v = 0; v < kPerChunk<T>; ++v) rows[threadIdx.x / kAcross * kChannels + channel() + v] = sums[v];
    for (int half = kRows / 2; half > 0; half /= 2) {
      block_sync();
      for (int i = threadIdx.x; i < half * kChannels; i += kThreads) rows[i] += rows[i + half * kChannels];
    }
    block_sync();
  }
};

// A block sums the pixels of one sample for eight chunks of channels.
template <class T>
__device__ __forceinline__ void conv_sample_sums(const ConvSampleSumParams& p) {
  using Sums = ConvSumBlock<T, kConvSumThreads, kSampleSumChunks>;
  constexpr int kChannels = Sums::kChannels;
  TDC_SHARED(float, rows, Sums::kRows* kChannels);
  const int sample = blockIdx.x / p.channel_tiles, first = blockIdx.x % p.channel_tiles * kChannels;
  const int live = live_width(p.routing.out_widths, group_of_sample(p.routing, sample), p.channels);

  float sums[kPerChunk<T>] = {};
  const int channel = first + Sums::channel();
  const T* source = static_cast<const T*>(p.dy) + static_cast<long long>(sample) * p.pixels * p.channels + channel;
  Sums::add_pixels(sums, source, p.channels, 0, p.pixels, live - channel, p.vector_source);
  Sums::reduce(sums, rows);

  for (int i = threadIdx.x; i < kChannels && first + i < p.channels; i += kConvSumThreads) {
    const float sum = first + i < live ? rows[i] : 0.0f;
    const long long place = static_cast<long long>(sample) * p.channels + first + i;
    if (p.dsample_bias) static_cast<T*>(p.dsample_bias)[place] = from_float<T>(sum);
    if (p.sums) p.sums[place] = sum;
  }
}

// A block sums the samples of one expert for 32 channels: 8 rows of threads share the samples of a group.
template <class T>
__device__ __forceinline__ void conv_expert_sums(const ConvExpertSumParams& p) {
  constexpr int kChannels = kExpertSumChannels, kRows = kConvSumThreads / kChannels;
  TDC_SHARED(float, rows, kRows* kChannels);
  const int expert = blockIdx.x / p.channel_tiles, row = threadIdx.x / kChannels;
  const int channel = blockIdx.x % p.channel_tiles * kChannels + threadIdx.x % kChannels;

  float sum = 0.0f;
  for (int group = 0; group < p.routing.num_groups; ++group) {
    if (channel >= p.channels || expert_of_group(p.routing, group) != expert) continue;
    const int first = clamp_to(p.routing.offsets[group], p.routing.batch);
    const int past = clamp_to(p.routing.offsets[group + 1], p.routing.batch);
    for (int sample = first + row; sample < past; sample += kRows) {
      sum += p.sums[static_cast<long long>(sample) * p.channels + channel];
    }
  }
  rows[threadIdx.x] = sum;
  block_sync();

  if (row != 0 || channel >= p.channels) return;
  for (int i = 1; i < kRows; ++i) sum += rows[i * kChannels + threadIdx.x];
  static_cast<T*>(p.dbias)[static_cast<long long>(expert) * p.channels + channel] = from_float<T>(sum);
}

}  // namespace tdc
