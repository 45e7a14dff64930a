// An image of few channels in shared memory: rows of pixels with zeros around the image, in which the elements that a
// pixel meets at all (tap, channel) pairs lie at fixed distances.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/few_params.h"
#include "cuda/conv/routing.cuh"

namespace tdc {

// The distance of an entry, tap * few + channel, from the first element that a pixel meets. `flipped`: the tap goes the
// other way, from a pixel of the result to the pixels that contribute to its gradient.
__device__ __forceinline__ int few_distance(const ConvFewGeometry& g, int entry, bool flipped) {
  const int tap = quotient(entry, g.by_few), channel = entry - tap * g.few;
  int row = (tap + (TDC_PLANTED(FEW_WRONG_TAP) ? 1 : 0)) / g.filter_width, column = tap % g.filter_width;
  if (flipped && !TDC_PLANTED(FEW_NOT_FLIPPED)) {
    row = g.filter_height - 1 - row;
    column = g.filter_width - 1 - column;
  }
  return row * g.pitch + column * g.few + channel;
}

template <class T>
class FewPatch {
 public:
  __device__ __forceinline__ FewPatch(const ConvFewGeometry& g, void* memory)
      : g_(g), cells_(static_cast<unsigned short*>(memory)) {}

  // Loads the rows of a sample from `first_row` on that pixels of `rows` rows meet; channels from `live` on are zeros.
  // All threads of the block.
  __device__ __forceinline__ void load(const T* image, int sample, int first_row, int rows, int live, int threads) {
    const int count = (rows + g_.filter_height - 1) * g_.pitch, padding = g_.filter_width / 2 * g_.few;
    const int top = first_row - g_.filter_height / 2, per_row = g_.width * g_.few;
    const T* source = image + static_cast<long long>(sample) * g_.height * per_row;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += threads) {
      const int row = quotient(i, g_.by_pitch), at = i - row * g_.pitch - padding, y = top + row;
      bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(g_.height) &&
                    static_cast<unsigned>(at) < static_cast<unsigned>(per_row);
      if (live < g_.few && inside) inside = at - quotient(at, g_.by_few) * g_.few < live;
      cells_[i] = inside ? source[y * per_row + at].bits : static_cast<unsigned short>(0);
    }
  }

  // Where the pixel `index` of the rows loaded, counted from the first one, meets its first element.
  __device__ __forceinline__ int place(int index) const {
    const int row = quotient(index, g_.by_width);
    return row * g_.pitch + (index - row * g_.width) * g_.few;
  }

  __device__ __forceinline__ unsigned at(int place) const { return cells_[place]; }

 private:
  const ConvFewGeometry& g_;
  unsigned short* cells_;
};

}  // namespace tdc
