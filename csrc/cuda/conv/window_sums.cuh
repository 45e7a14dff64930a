// What stands for dy in the wgrad of an upsampled image. A pixel of x meets the gradients of its 2 x 2 pixels, moved by
// the tap: with the sums of dy over all windows of 2 x 2 pixels made first, dweight of tap (r, s) is the sum over the
// pixels (i, j) of x of
//
//   windows[2 i + 2 - r, 2 j + 2 - s] x[i, j]       windows[k, l] = dy[k - 1, l - 1] + ... + dy[k, l], zeros outside
//
// A quarter of the products of the upsampled image remain, and for a tap all windows are of one parity, a plane of them
// (hopper_strided_params.h). The windows at odd lines and columns share no pixel: their sums before rounding are the
// sums of the samples that biases need. Windows are rounded to the dtype of dy; what a group has past its width is
// zero.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/channel_sums.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/routing.cuh"

namespace tdc {

// A block takes a strip of the lines of one sample's windows, eight chunks of channels.
template <class T>
__device__ __forceinline__ void conv_window_sums(const ConvWindowSumParams& p) {
  using Sums = ConvSumBlock<T, kWindowSumThreads, kWindowSumChunks>;
  constexpr int kChannels = Sums::kChannels, kChunk = kPerChunk<T>;
  TDC_SHARED(float, rows, Sums::kRows* kChannels);
  unsigned block = blockIdx.x;
  const int first_channel = block % p.channel_tiles * kChannels, channel = first_channel + Sums::channel();
  block /= p.channel_tiles;
  const int strip = block % p.strips, sample = block / p.strips, columns = p.width + 1;
  const int first_line = strip * p.lines, lines = min(p.lines, p.height + 1 - first_line);
  const int live = live_width(p.routing.out_widths, group_of_sample(p.routing, sample), p.channels) - channel;
  const long long line = static_cast<long long>(p.width) * p.channels;
  const T* dy = static_cast<const T*>(p.dy) + sample * p.height * line + channel;
  T* windows = static_cast<T*>(p.windows) +
               (static_cast<long long>(sample) * (p.height + 1) + first_line) * columns * p.channels + channel;

  float totals[kChunk] = {};
#pragma unroll 2
  for (int i = threadIdx.x / kWindowSumChunks; i < lines * columns && channel < p.channels; i += Sums::kRows) {
    const int down = quotient(i, p.by_columns), k = first_line + down, l = i - down * columns;
    float sums[kChunk] = {};
#pragma unroll
    for (int pixel = TDC_PLANTED(CONV_HALF_WINDOW) ? 2 : 0; pixel < 4; ++pixel) {
      const int y = k - 1 + pixel / 2, x = l - 1 + pixel % 2;
      if (y < 0 || y >= p.height || x < 0 || x >= p.width || live <= 0) continue;
      add_chunk(sums, dy + y * line + static_cast<long long>(x) * p.channels, live, live >= kChunk);
    }
    store_chunk(windows + static_cast<long long>(i) * p.channels, sums, kChunk, true);
    if (k % 2 == 0 || l % 2 == 0) continue;
#pragma unroll
    for (int v = 0; v < kChunk; ++v) totals[v] += sums[v];
  }
  if (!p.sample_sums) return;
  Sums::reduce(totals, rows);
  float* to = p.sample_sums + (static_cast<long long>(strip) * p.routing.batch + sample) * p.pitch + first_channel;
  for (int i = threadIdx.x; i < kChannels && first_channel + i < p.channels; i += kWindowSumThreads) to[i] = rows[i];
}

}  // namespace tdc
