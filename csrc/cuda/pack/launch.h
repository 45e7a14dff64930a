// Plans the launch that packs experts.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch/launch.h"

namespace tdc {

// Device addresses and strides in elements; see PackParams. A bias or a norm's affine has in_channels = taps = 1.
struct PackArguments {
  uintptr_t source = 0;
  uintptr_t target = 0;
  uintptr_t out_order = 0;
  uintptr_t in_order = 0;
  uintptr_t out_widths = 0;
  uintptr_t in_widths = 0;
  int element_size = 4;  // bytes: 2, 4 or 8
  int64_t num_experts = 0;
  int64_t out_channels = 0;
  int64_t in_channels = 1;
  int64_t taps = 1;
  int64_t source_out_channels = 0;
  int64_t source_in_channels = 1;
  int64_t source_expert_stride = 0;
  int64_t source_out_stride = 1;
  int64_t source_in_stride = 1;
  int64_t source_tap_stride = 1;
  int64_t target_expert_stride = 0;
  int64_t target_out_stride = 1;
  int64_t target_in_stride = 1;
  int64_t target_tap_stride = 1;
};

// One launch for all experts of one tensor, none for an empty one. Throws std::invalid_argument for sizes that do not
// fit. On the device an order that points past the source traps.
std::vector<Launch> launch_pack_experts(const PackArguments& arguments, const Device& device);

}  // namespace tdc
