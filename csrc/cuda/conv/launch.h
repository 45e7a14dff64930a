// Plans the launches of the routed convolution on a GPU: which kernel, which grid, its parameters. No CUDA needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/launch/launch.h"

namespace tdc {

// Device addresses, 0 where absent. Activations are dense NHWC, weights [E, C_out, R, S, C_in]; `tiles` is the whole
// tile table of the plan. dtype: 0 fp32 (only with tf32), 1 bf16, 2 fp16. The last x2_channels of the input
// channels are in x2, if there are any, and their gradients in dx2. Every pixel of the input stands for upsample x
// upsample.
struct ConvArguments {
  uintptr_t x = 0, x2 = 0, weight = 0, bias = 0, sample_bias = 0, residual = 0, y = 0;  // forward
  uintptr_t dy = 0, dx = 0, dx2 = 0;                                                    // dgrad
  uintptr_t dweight = 0, dbias = 0, dsample_bias = 0;                                   // wgrad
  uintptr_t workspace = 0;                                                              // all
  uintptr_t offsets = 0, tiles = 0, weight_index = 0, in_widths = 0, out_widths = 0;
  int dtype = 0;
  bool tf32 = false;
  int64_t batch = 0, height = 0, width = 0, in_channels = 0, out_channels = 0;
  int64_t filter_height = 0, filter_width = 0, stride_height = 1, stride_width = 1, pad_height = 0, pad_width = 0;
  int64_t num_groups = 0, num_experts = 0, x2_channels = 0, upsample = 1;
  bool hopper = false;  // the Hopper form, where it serves

  int64_t x_channels() const { return in_channels - x2_channels; }
  int64_t out_height() const { return (upsample * height + 2 * pad_height - filter_height) / stride_height + 1; }
  int64_t out_width() const { return (upsample * width + 2 * pad_width - filter_width) / stride_width + 1; }
};

// y = routed conv2d of x, plus bias, sample_bias and residual where given. All throw std::invalid_argument for sizes
// and dtypes that no kernel takes. An empty batch needs no launch. `workspace` has conv_forward_workspace bytes,
// 16-byte aligned; without it every product of an upsampled image is computed.
std::vector<Launch> launch_conv_forward(const ConvArguments& arguments, const Device& device);
size_t conv_forward_workspace(const ConvArguments& arguments, const Device& device);

// dx and dx2 are written completely. An upsampled image takes stride 1. `workspace` has conv_dgrad_workspace bytes,
// 16-byte aligned; without it every product of the upsampled image is computed.
std::vector<Launch> launch_conv_dgrad(const ConvArguments& arguments, const Device& device);
size_t conv_dgrad_workspace(const ConvArguments& arguments, const Device& device);

// Each of dweight, dbias and dsample_bias that is not 0 is written completely. `workspace` has conv_wgrad_workspace
// bytes, 16-byte aligned.
std::vector<Launch> launch_conv_wgrad(const ConvArguments& arguments, const Device& device);
size_t conv_wgrad_workspace(const ConvArguments& arguments, const Device& device);

}  // namespace tdc
