// Reads the routing of a batch from device memory, clamped so that no index can leave its array.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/params.h"

namespace tdc {

__device__ __forceinline__ int clamp_to(int value, int largest) { return max(0, min(value, largest)); }

// Live channels of a group.
__device__ __forceinline__ int live_width(const int* widths, int group, int channels) {
  return widths ? clamp_to(widths[group], channels) : channels;
}

__device__ __forceinline__ int expert_of_group(const ConvRouting& routing, int group) {
  return clamp_to(routing.weight_index ? routing.weight_index[group] : group, routing.num_experts - 1);
}

// The group that holds a sample: the last that begins at or before it.
__device__ __forceinline__ int group_of_sample(const ConvRouting& routing, int sample) {
  int low = 0, high = routing.num_groups;  // offsets[low] <= sample < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (routing.offsets[middle] <= sample) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// 0 <= n < 2^31.
__device__ __forceinline__ int quotient(int n, const FastDivisor& by) {
  if (by.divisor == 1) return n;
  const unsigned long long product = static_cast<unsigned long long>(n) * by.multiplier;
  return static_cast<int>(static_cast<unsigned>(product >> 32) >> by.shift);
}

}  // namespace tdc
