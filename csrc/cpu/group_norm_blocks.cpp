#include "cpu/group_norm_blocks.h"

#include <stdexcept>
#include <string>

namespace tdc {
namespace {

[[noreturn]] void refuse(const char* argument, int64_t value, const std::string& expected) {
  throw std::invalid_argument(std::string(argument) + ": got " + std::to_string(value) + "; expected " + expected);
}

}  // namespace

void check_group_norm(const GroupNormProblem& p) {
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kBFloat16) {
    refuse("dtype", static_cast<int64_t>(p.dtype), "0 (fp32) or 1 (bf16)");
  }
  if (p.batch < 0 || p.height < 0 || p.width < 0) {
    refuse("batch, height, width", std::min({p.batch, p.height, p.width}), "none negative");
  }
  if (p.channels < 1) refuse("channels", p.channels, "at least 1");
  if (p.num_norm_groups < 1 || p.channels % p.num_norm_groups) {
    refuse("num_norm_groups", p.num_norm_groups, "a divisor of the " + std::to_string(p.channels) + " channels");
  }
  if (p.num_groups < 1) refuse("num_groups", p.num_groups, "at least 1");
  if (p.num_experts < 1) refuse("num_experts", p.num_experts, "at least 1");
  if (!p.offsets) refuse("offsets", 0, "the address of num_groups + 1 offsets");
  if (p.offsets[0] != 0) refuse("offsets[0]", p.offsets[0], "0");
  if (p.offsets[p.num_groups] != p.batch) {
    refuse("offsets[num_groups]", p.offsets[p.num_groups], "the batch size " + std::to_string(p.batch));
  }
  for (int64_t g = 0; g < p.num_groups; ++g) {
    if (p.offsets[g + 1] < p.offsets[g]) {
      refuse("offsets", p.offsets[g + 1], "at least the one before, " + std::to_string(p.offsets[g]));
    }
    const int64_t expert = p.weight_index ? p.weight_index[g] : g;
    if (expert < 0 || expert >= p.num_experts) {
      refuse("weight_index", expert, "an expert in [0, " + std::to_string(p.num_experts) + ")");
    }
    const int64_t width = p.widths ? p.widths[g] : p.channels;
    if (width < 0 || width > p.channels || width % p.channels_per_group()) {
      refuse("widths", width,
             "a multiple of " + std::to_string(p.channels_per_group()) + " up to the " + std::to_string(p.channels) +
                 " channels");
    }
  }
}

}  // namespace tdc
