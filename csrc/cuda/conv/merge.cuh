// Weights for the gradient of an upsampled image. A pixel of x gets the gradients of its 2 x 2 pixels, and several taps
// pair one pixel of dy with it: with these added up first, dx is the forward convolution of dy, of stride 2 and a
// filter that is one larger, and 4/9 of the products of 3x3 remain. Along an axis of R taps, the t-th is w[R-1-t] +
// w[R-t], where they exist. The sums are rounded to the weights' dtype.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/params.h"

namespace tdc {

// A block takes one tap of kMergeChannels x kMergeChannels channels, which change places in shared memory.
template <class T>
__device__ __forceinline__ void conv_merge_taps(const ConvMergeParams& p) {
  constexpr int kPitch = kMergeChannels + 1, kRows = kConvSumThreads / kMergeChannels;
  TDC_SHARED(float, tile, kMergeChannels* kPitch);
  const int across = p.filter_width + 1, taps = (p.filter_height + 1) * across;
  unsigned block = blockIdx.x;
  const int first_out = block % p.out_tiles * kMergeChannels;
  block /= p.out_tiles;
  const int first_in = block % p.in_tiles * kMergeChannels;
  block /= p.in_tiles;
  const int tap = block % taps, expert = block / taps;
  const int top = p.filter_height - 1 - tap / across, left = p.filter_width - 1 - tap % across;
  const int lane = threadIdx.x % kMergeChannels, row = threadIdx.x / kMergeChannels;

  for (int o = row; o < kMergeChannels; o += kRows) {
    const int out = first_out + o, in = first_in + lane;
    float sum = 0;
    if (out < p.out_channels && in < p.in_channels) {
      const long long filter = static_cast<long long>(expert) * p.out_channels + out;
      for (int r = max(top, 0); r < min(top + 2, p.filter_height); ++r) {
        for (int s = max(left, 0); s < min(left + (TDC_PLANTED(CONV_MERGES_HALF) ? 1 : 2), p.filter_width); ++s) {
          const long long at = (filter * p.filter_height + r) * p.filter_width + s;
          sum += to_float(static_cast<const T*>(p.weight)[at * p.in_channels + in]);
        }
      }
    }
    tile[o * kPitch + lane] = sum;
  }
  block_sync();
  for (int i = row; i < kMergeChannels; i += kRows) {
    const int in = first_in + i, out = first_out + lane;
    if (in >= p.in_channels || out >= p.out_channels) continue;
    const long long at = (static_cast<long long>(expert) * p.in_channels + in) * taps + tap;
    static_cast<T*>(p.merged)[at * p.out_channels + out] = from_float<T>(tile[lane * kPitch + i]);
  }
}

}  // namespace tdc
