#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/conv_gather.h"

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
  require(height + 2 * pad_height >= filter_height, "height", height, "at least the filter less the padding");
  require(width + 2 * pad_width >= filter_width, "width", width, "at least the filter less the padding");
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

void GatherGeometry::set_forward(const Conv2dProblem& p) {
  source_height = p.height, source_width = p.width, source_channels = p.in_channels;
  dest_height = p.out_height(), dest_width = p.out_width(), dest_channels = p.out_channels;
  source_step_h = p.stride_height, source_step_w = p.stride_width;
  dest_step_h = dest_step_w = 1;
  lane_stride = p.weight_strides[1], depth_stride = p.weight_strides[2];
  taps.clear();
  for (int64_t r = 0; r < p.filter_height; ++r)
    for (int64_t s = 0; s < p.filter_width; ++s)
      taps.push_back({r - p.pad_height, s - p.pad_width, r * p.weight_strides[3] + s * p.weight_strides[4]});
  phases.assign(1, {0, 0, dest_height, dest_width, 0, static_cast<int>(taps.size())});
  finish();
}

void GatherGeometry::set_dgrad(const Conv2dProblem& p) {
  source_height = p.out_height(), source_width = p.out_width(), source_channels = p.out_channels;
  dest_height = p.height, dest_width = p.width, dest_channels = p.in_channels;
  source_step_h = source_step_w = 1;
  dest_step_h = p.stride_height, dest_step_w = p.stride_width;
  lane_stride = p.weight_strides[2], depth_stride = p.weight_strides[1];
  taps.clear();
  phases.clear();
  for (int64_t a = 0; a < dest_step_h; ++a) {
    for (int64_t b = 0; b < dest_step_w; ++b) {
      GatherPhase phase = {a, b, (dest_height - a + dest_step_h - 1) / dest_step_h,
                           (dest_width - b + dest_step_w - 1) / dest_step_w, static_cast<int>(taps.size()), 0};
      // dx[h] sums dy[o] over taps r with o * stride + r - pad = h; only exact quotients count.
      for (int64_t r = 0; r < p.filter_height; ++r) {
        const int64_t row = a + p.pad_height - r;
        if (row % dest_step_h != 0) continue;
        for (int64_t s = 0; s < p.filter_width; ++s) {
          const int64_t column = b + p.pad_width - s;
          if (column % dest_step_w != 0) continue;
          taps.push_back(
              {row / dest_step_h, column / dest_step_w, r * p.weight_strides[3] + s * p.weight_strides[4]});
        }
      }
      phase.tap_end = static_cast<int>(taps.size());
      phases.push_back(phase);
    }
  }
  finish();
}

void GatherGeometry::finish() {
  rows = (dest_height + dest_step_h - 1) / dest_step_h;
  columns = (dest_width + dest_step_w - 1) / dest_step_w;
  min_row = max_row = taps.empty() ? 0 : taps[0].row;
  min_column = max_column = taps.empty() ? 0 : taps[0].column;
  const int64_t count = static_cast<int64_t>(taps.size());
  tap_weights.clear();
  tap_at.assign(taps.size(), -1);
  for (int64_t t = 0; t < count; ++t) {
    const GatherTap& tap = taps[t];
    min_row = std::min(min_row, tap.row), max_row = std::max(max_row, tap.row);
    min_column = std::min(min_column, tap.column), max_column = std::max(max_column, tap.column);
    tap_weights.push_back(tap.weight);
    if (!tap_at.empty()) {
      if (tap.weight >= 0 && tap.weight < count && tap_at[tap.weight] < 0)
        tap_at[tap.weight] = static_cast<int32_t>(t);
      else
        tap_at.clear();
    }
  }
}

}  // namespace tdc
