// Plans the Hopper form (conv/hopper_images.cuh, conv/hopper_rows.cuh, conv/hopper_strided.cuh, conv/hopper_wgrad.cuh):
// where it serves, and its launches.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "cuda/conv/launch.h"

namespace tdc {

// Why the Hopper form does not serve a convolution of these sizes in any pass, as the end of a sentence, or "".
std::string hopper_refusal(const ConvArguments& arguments, const Device& device);

// The same of forward or dgrad, and of wgrad.
std::string hopper_refusal(const ConvArguments& arguments, const Device& device, bool forward);
std::string hopper_wgrad_refusal(const ConvArguments& arguments, const Device& device);

// Whether it is served in the form of rows: 1x1 filters, and 3x3 filters on images of few pixels. Why that form does
// not serve forward or dgrad, and their launches.
bool takes_rows(const ConvArguments& arguments);
std::string hopper_rows_refusal(const ConvArguments& arguments, const Device& device);
std::vector<Launch> launch_hopper_rows(const ConvArguments& arguments, const Device& device, bool forward);

// A kernel that may run, without its element type; the clocks that it takes by the model (conv/hopper_model.h); the
// columns that a product may have, from the fewest up to all of a tile's.
struct HopperChoice {
  std::string kernel;
  int64_t clocks;
  std::array<int, 3> columns;
};

// Whether forward and dgrad are served in the form of images and in that of rows; the tiles of the latter, the chosen
// one first.
bool may_take_rows(const ConvArguments& arguments);
std::vector<HopperChoice> hopper_rows_choices(const ConvArguments& arguments, const Device& device, bool forward);

// All tiles of forward or dgrad, the chosen one first. Throws std::invalid_argument for sizes that the form does not
// serve.
std::vector<HopperChoice> hopper_choices(const ConvArguments& arguments, const Device& device, bool forward);

// The same of the form of stride 2: 3x3 filters with padding 1. Its clocks are those of products alone.
bool takes_strides(const ConvArguments& arguments);
std::string hopper_strided_refusal(const ConvArguments& arguments, const Device& device);
std::vector<HopperChoice> hopper_strided_choices(const ConvArguments& arguments, const Device& device, bool forward);
std::vector<Launch> launch_hopper_strided(const ConvArguments& arguments, const Device& device, bool forward);

// The same of the images that are upsampled in front of 3x3 filters, one input: taps are merged into the workspace
// (conv/merge.cuh), and the form of stride 2 takes these. In wgrad windows of dy are summed there (window_sums.cuh).
bool takes_upsampled(const ConvArguments& arguments);
std::string hopper_upsampled_refusal(const ConvArguments& arguments, const Device& device);
std::vector<Launch> launch_hopper_upsampled(const ConvArguments& arguments, const Device& device, bool forward);

// One launch, or two of an upsampled image, or none for an empty batch. Only where the form serves.
std::vector<Launch> launch_hopper_forward(const ConvArguments& arguments, const Device& device);
std::vector<Launch> launch_hopper_dgrad(const ConvArguments& arguments, const Device& device);

// Whether the launches of dweight also sum dbias and dsample_bias, where these are wanted.
bool hopper_sums_biases(const ConvArguments& arguments);

// dweight, and with it the biases' gradients (hopper_sums_biases); hopper_wgrad_workspace bytes at `workspace`. Only
// where the form serves.
std::vector<Launch> launch_hopper_wgrad(const ConvArguments& arguments, const Device& device);
size_t hopper_wgrad_workspace(const ConvArguments& arguments, const Device& device);

}  // namespace tdc
