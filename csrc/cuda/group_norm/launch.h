// Plans the launches of group norm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/launch/launch.h"

namespace tdc {

// Device addresses, 0 where a tensor is absent: a weight of ones, any other zeros, widths: all channels. Activations
// are NHWC. The last x2_channels of the channels are in x2, if there are any, and their gradients in dx2. Shapes as in
// cpu/group_norm.h; dtype 0 = fp32, 1 = bf16, 2 = fp16; mean and rstd are fp32.
struct NormArguments {
  uintptr_t x = 0;
  uintptr_t x2 = 0;
  uintptr_t weight = 0;
  uintptr_t bias = 0;
  uintptr_t scale = 0;
  uintptr_t shift = 0;
  uintptr_t y = 0;  // forward only
  uintptr_t mean = 0;
  uintptr_t rstd = 0;
  uintptr_t offsets = 0;
  uintptr_t weight_index = 0;
  uintptr_t widths = 0;
  uintptr_t workspace = 0;
  uintptr_t counters = 0;  // int (experts, norm groups): forward writes zeros, backward counts and leaves zeros
  int dtype = 0;
  int64_t batch = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t channels = 0;
  int64_t x2_channels = 0;
  int64_t num_norm_groups = 1;
  double eps = 1e-5;
  bool silu = false;
  int64_t num_groups = 0;
  int64_t num_experts = 0;
  bool streamed = false;      // as a stream (stream.cuh) or by clusters (cluster.cuh), where these serve
  int64_t scale_stride = -1;  // elements between the rows of scale and of shift; negative: channels
  int64_t shift_stride = -1;
};

// A gradient at address 0 is not computed.
struct NormBackwardArguments : NormArguments {
  uintptr_t dy = 0;
  uintptr_t dx = 0;
  uintptr_t dx2 = 0;
  uintptr_t dweight = 0;
  uintptr_t dbias = 0;
  uintptr_t dscale = 0;
  uintptr_t dshift = 0;
};

// Why the kernels cannot serve these sizes, or "": shared memory has to hold a pixel of one norm group.
std::string group_norm_refusal(const NormArguments& arguments, const Device& device, bool backward);

// How these sizes run where `streamed`, in words, and why not otherwise.
std::string group_norm_hopper_form(const NormArguments& arguments, const Device& device, bool backward);

// Bytes of workspace, 16-byte aligned memory of any content. They follow from sizes, the alignment of the addresses and
// which gradients are wanted; the workspace address itself does not matter.
size_t group_norm_forward_workspace(const NormArguments& arguments, const Device& device);
size_t group_norm_backward_workspace(const NormBackwardArguments& arguments, const Device& device);

// One launch where a sample's pixels fit in shared memory chunk by chunk (of a block or a cluster), else two; backward
// has one more for dweight and dbias where it has no counters or many samples. Backward without samples still writes
// the zeros of dweight and dbias. Throws std::invalid_argument with what group_norm_refusal says.
std::vector<Launch> launch_group_norm_forward(const NormArguments& arguments, const Device& device);
std::vector<Launch> launch_group_norm_backward(const NormBackwardArguments& arguments, const Device& device);

}  // namespace tdc
