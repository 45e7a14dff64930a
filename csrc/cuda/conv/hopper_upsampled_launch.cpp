#include <algorithm>

#include "cuda/conv/hopper_launch.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

bool takes_upsampled(const ConvArguments& a) {
  return a.upsample == 2 && a.x2_channels == 0 && a.filter_height == 3 && a.filter_width == 3 && a.stride_height == 1 &&
         a.stride_width == 1 && a.pad_height == 1 && a.pad_width == 1;
}

std::string hopper_upsampled_refusal(const ConvArguments& a, const Device& device) {
  if (std::min(a.height, a.width) < 2) return "it upsamples images from 2x2 on";
  return hopper_strided_refusal(merged_convolution(a), device);
}

// The merged convolution leads from y to x: what is forward here is its dgrad.
std::vector<Launch> launch_hopper_upsampled(const ConvArguments& a, const Device& device, bool forward) {
  if (a.batch == 0) return {};
  std::vector<Launch> launches{launch_merge_taps(a, "tdc_conv_hopper_merge_taps_")};
  launches.push_back(launch_hopper_strided(merged_convolution(a), device, !forward).front());
  return launches;
}

}  // namespace tdc
