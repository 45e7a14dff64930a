// Experts' weights permuted by their channel orders and cut to their widths. Block (x, e) writes a run of expert e's
// elements in the order of the target's memory; only reads are scattered.
#pragma once

#include "cuda/device.cuh"
#include "cuda/pack/params.h"

namespace tdc {

// The source channel of target channel c, -1 where it is dead. An order that points outside stops the kernel.
__device__ __forceinline__ int source_channel(const int* order, const int* widths, int expert, int c, int channels,
                                              int source_channels) {
  if (widths && c >= widths[expert] + (TDC_PLANTED(PACK_ONE_PAST_WIDTH) ? 1 : 0)) return -1;
  const int from = order ? order[static_cast<long long>(expert) * channels + c] : c;
  if (from < 0 || from >= source_channels) {
    trap();
    return -1;
  }
  return from;
}

template <class Element>
__device__ __forceinline__ void pack_experts(const PackParams& p) {
  const Element* source = static_cast<const Element*>(p.source);
  Element* target = static_cast<Element*>(p.target);
  const int expert = blockIdx.y, inner = p.taps_inside ? p.taps : p.in_channels;
  const unsigned row = static_cast<unsigned>(p.in_channels) * p.taps, elements = row * p.out_channels;
  for (unsigned index = blockIdx.x * blockDim.x + threadIdx.x; index < elements; index += gridDim.x * blockDim.x) {
    const int out = index / row, rest = index % row;
    const int outer_part = rest / inner, inner_part = rest % inner;
    const int in = p.taps_inside ? outer_part : inner_part, tap = p.taps_inside ? inner_part : outer_part;
    const int from_out = source_channel(p.out_order, p.out_widths, expert, out, p.out_channels, p.source_out_channels);
    const int from_in = source_channel(p.in_order, p.in_widths, expert, in, p.in_channels, p.source_in_channels);
    Element value = 0;
    if (from_out >= 0 && from_in >= 0) {
      value = source[expert * p.source_stride[0] + from_out * p.source_stride[1] + from_in * p.source_stride[2] +
                     tap * p.source_stride[3]];
    }
    target[expert * p.target_stride[0] + out * p.target_stride[1] + in * p.target_stride[2] +
           tap * p.target_stride[3]] = value;
  }
}

}  // namespace tdc
