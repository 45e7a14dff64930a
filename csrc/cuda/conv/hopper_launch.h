// Plans the Hopper form of forward and dgrad (conv/hopper_images.cuh): where it serves, and its launches.
#pragma once

#include <string>
#include <vector>

#include "cuda/conv/launch.h"

namespace tdc {

// Why the Hopper form does not serve a forward or dgrad of these sizes, as the end of a sentence; "" where it does.
std::string hopper_refusal(const ConvArguments& arguments, const Device& device, bool forward);

// One launch, or none for an empty batch. Only where the form serves.
std::vector<Launch> launch_hopper_forward(const ConvArguments& arguments, const Device& device);
std::vector<Launch> launch_hopper_dgrad(const ConvArguments& arguments, const Device& device);

}  // namespace tdc
