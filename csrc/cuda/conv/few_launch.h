// Plans the launches of layers with few channels on one side (few_params.h).
#pragma once

#include <string>
#include <vector>

#include "cuda/conv/launch.h"

namespace tdc {

enum class ConvDirection { kForward, kDgrad, kWgrad };

// Why no kernel for few channels serves a direction of a convolution, or "".
std::string few_refusal(const ConvArguments& arguments, const Device& device, ConvDirection direction);

// Forward or dgrad.
std::vector<Launch> launch_few_images(const ConvArguments& arguments, const Device& device, ConvDirection direction);

// dweight, and dbias where it comes with it.
std::vector<Launch> launch_few_wgrad(const ConvArguments& arguments, const Device& device);
size_t few_wgrad_workspace(const ConvArguments& arguments, const Device& device);

}  // namespace tdc
