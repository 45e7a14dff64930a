#include "cpu/conv.h"

#include <stdexcept>
#include <string>

namespace tdc {
namespace {

void require(bool condition, const char* what, int64_t value, const char* expected) {
  if (!condition)
    throw std::invalid_argument(std::string(what) + ": got " + std::to_string(value) + "; expected " + expected);
}

}  // namespace

void Conv2dProblem::check() const {
  require(dtype == DType::kFloat32 || dtype == DType::kBFloat16, "dtype", static_cast<int>(dtype), "0 or 1");
  require(batch >= 0, "batch", batch, "0 or more");
  require(in_channels >= 1, "in_channels", in_channels, "1 or more");
  require(out_channels >= 1, "out_channels", out_channels, "1 or more");
  require(filter_height >= 1, "filter_height", filter_height, "1 or more");
  require(filter_width >= 1, "filter_width", filter_width, "1 or more");
  require(stride_height >= 1, "stride_height", stride_height, "1 or more");
  require(stride_width >= 1, "stride_width", stride_width, "1 or more");
  require(pad_height >= 0, "pad_height", pad_height, "0 or more");
  require(pad_width >= 0, "pad_width", pad_width, "0 or more");
  require(upsample == 1 || upsample == 2, "upsample", upsample, "1 or 2");
  require(x2_channels >= 0 && x2_channels < in_channels, "x2_channels", x2_channels, "0 .. in_channels - 1");
  require(upsample * height + 2 * pad_height >= filter_height, "height", height,
          "at least the filter less the padding");
  require(upsample * width + 2 * pad_width >= filter_width, "width", width, "at least the filter less the padding");
  require(num_groups >= 1, "num_groups", num_groups, "1 or more");
  require(offsets[0] == 0, "offsets[0]", offsets[0], "0");
  require(offsets[num_groups] == batch, "offsets[-1]", offsets[num_groups], "the batch size");
  for (int64_t g = 0; g < num_groups; ++g) {
    require(offsets[g] <= offsets[g + 1], "offsets", offsets[g + 1], "no decrease");
    require(expert(g) >= 0 && expert(g) < num_experts, "weight_index", expert(g), "an expert");
    require(live_in(g) >= 0 && live_in(g) <= in_channels, "in_widths", live_in(g), "0 .. in_channels");
    require(live_out(g) >= 0 && live_out(g) <= out_channels, "out_widths", live_out(g), "0 .. out_channels");
  }
}

}  // namespace tdc
