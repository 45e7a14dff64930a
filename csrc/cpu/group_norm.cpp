#include "cpu/group_norm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tdc {
namespace {

[[noreturn]] void refuse(const char* argument, int64_t value, const std::string& expected) {
  throw std::invalid_argument(std::string(argument) + ": got " + std::to_string(value) + "; expected " + expected);
}

}  // namespace

void GroupNormProblem::check() const {
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) {
    refuse("dtype", static_cast<int64_t>(dtype), "0 (fp32) or 1 (bf16)");
  }
  if (batch < 0 || height < 0 || width < 0) {
    refuse("batch, height, width", std::min({batch, height, width}), "none negative");
  }
  if (channels < 1) refuse("channels", channels, "at least 1");
  if (x2_channels < 0 || x2_channels >= channels) {
    refuse("x2_channels", x2_channels, "0 to all but one of the " + std::to_string(channels) + " channels");
  }
  if (num_norm_groups < 1 || channels % num_norm_groups) {
    refuse("num_norm_groups", num_norm_groups, "a divisor of the " + std::to_string(channels) + " channels");
  }
  if (num_groups < 1) refuse("num_groups", num_groups, "at least 1");
  if (num_experts < 1) refuse("num_experts", num_experts, "at least 1");
  if (!offsets) refuse("offsets", 0, "the address of num_groups + 1 offsets");
  if (offsets[0] != 0) refuse("offsets[0]", offsets[0], "0");
  if (offsets[num_groups] != batch) {
    refuse("offsets[num_groups]", offsets[num_groups], "the batch size " + std::to_string(batch));
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    if (offsets[g + 1] < offsets[g]) {
      refuse("offsets", offsets[g + 1], "at least the one before, " + std::to_string(offsets[g]));
    }
    const int64_t expert = weight_index ? weight_index[g] : g;
    if (expert < 0 || expert >= num_experts) {
      refuse("weight_index", expert, "an expert in [0, " + std::to_string(num_experts) + ")");
    }
    const int64_t live = widths ? widths[g] : channels;
    if (live < 0 || live > channels || live % channels_per_group()) {
      refuse("widths", live,
             "a multiple of " + std::to_string(channels_per_group()) + " up to the " + std::to_string(channels) +
                 " channels");
    }
  }
}

}  // namespace tdc
