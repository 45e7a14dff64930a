#include "cpu/conv_geometry.h"

#include <algorithm>
#include <numeric>

#include "cpu/conv_kernels.h"

namespace tdc {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

}  // namespace

void Axis::set_forward(int64_t source, int64_t dest, int64_t filter, int64_t stride, int64_t pad, int64_t upsample) {
  const int64_t common = std::gcd(stride, upsample);
  source_size = source, dest_size = dest, source_step = stride / common, dest_step = upsample / common;
  phases.resize(dest_step);
  for (int64_t a = 0; a < dest_step; ++a) {
    AxisPhase& phase = phases[a];
    phase.phase = a;
    phase.taps.clear(), phase.filter.clear();
    for (int64_t r = 0; r < filter; ++r) {
      const int64_t tap = floor_div(a * stride + r - pad, upsample);
      if (phase.taps.empty() || phase.taps.back() != tap)
        phase.taps.push_back(tap), phase.filter.push_back({r, r + 1});
      else
        phase.filter.back().end = r + 1;
    }
  }
  finish();
}

void Axis::set_dgrad(int64_t source, int64_t dest, int64_t filter, int64_t stride, int64_t pad, int64_t upsample) {
  const int64_t common = std::gcd(stride, upsample);
  source_size = source, dest_size = dest, source_step = upsample / common, dest_step = stride / common;
  phases.resize(dest_step);
  for (int64_t a = 0; a < dest_step; ++a) {
    AxisPhase& phase = phases[a];
    phase.phase = a;
    phase.taps.clear(), phase.filter.clear();
    // dx[h] sums dy[o] over filter rows r with o * stride + r - pad = h * upsample + b, 0 <= b < upsample. So a tap o
    // has the rows first - o * stride .. + upsample; taps fall as rows rise.
    const int64_t first = a * upsample + pad;
    for (int64_t tap = floor_div(first + upsample - 1, stride);; --tap) {
      const int64_t begin = std::max<int64_t>(0, first - tap * stride);
      const int64_t end = std::min(filter, first - tap * stride + upsample);
      if (begin >= filter) break;
      if (begin < end) phase.taps.push_back(tap), phase.filter.push_back({begin, end});
    }
  }
  finish();
}

bool Axis::fits_row_tiles() const {
  if (phases.size() != 1 || source_step != 1 || source_size != dest_size || dest_size % kRowPixels != 0) return false;
  return phases[0].taps.size() == 3 && min_tap == -1 && max_tap == 1;
}

bool Axis::is_identity() const {
  if (phases.size() != 1 || source_step != 1 || source_size != dest_size) return false;
  return phases[0].taps.size() == 1 && phases[0].taps[0] == 0;
}

void Axis::finish() {
  indices = (dest_size + dest_step - 1) / dest_step;
  min_tap = max_tap = 0;
  bool any = false;
  for (AxisPhase& phase : phases) {
    for (int64_t tap : phase.taps) {
      min_tap = any ? std::min(min_tap, tap) : tap;
      max_tap = any ? std::max(max_tap, tap) : tap;
      any = true;
    }
    // Taps are monotonic, so those inside the source are adjacent.
    phase.runs.clear();
    const int64_t count = (dest_size - phase.phase + dest_step - 1) / dest_step;
    const int taps = static_cast<int>(phase.taps.size());
    for (int64_t i = 0; i < count; ++i) {
      const auto inside = [&](int t) {
        const int64_t at = i * source_step + phase.taps[t];
        return at >= 0 && at < source_size;
      };
      int begin = 0, end = taps;
      while (begin < end && !inside(begin)) ++begin;
      while (end > begin && !inside(end - 1)) --end;
      if (begin == end) begin = end = 0;
      if (!phase.runs.empty() && phase.runs.back().tap_begin == begin && phase.runs.back().tap_end == end)
        phase.runs.back().end = i + 1;
      else
        phase.runs.push_back({i, i + 1, begin, end});
    }
  }
}

void GatherGeometry::set(const Conv2dProblem& p, bool dgrad) {
  source_channels = dgrad ? p.out_channels : p.in_channels;
  dest_channels = dgrad ? p.in_channels : p.out_channels;
  lane_stride = p.weight_strides[dgrad ? 2 : 1], depth_stride = p.weight_strides[dgrad ? 1 : 2];
  if (dgrad) {
    rows.set_dgrad(p.out_height(), p.height, p.filter_height, p.stride_height, p.pad_height, p.upsample);
    columns.set_dgrad(p.out_width(), p.width, p.filter_width, p.stride_width, p.pad_width, p.upsample);
  } else {
    rows.set_forward(p.height, p.out_height(), p.filter_height, p.stride_height, p.pad_height, p.upsample);
    columns.set_forward(p.width, p.out_width(), p.filter_width, p.stride_width, p.pad_width, p.upsample);
  }
  first_tap.clear(), taps.clear(), tap_weights.clear();
  for (const AxisPhase& row : rows.phases) {
    for (const AxisPhase& column : columns.phases) {
      first_tap.push_back(num_taps());
      for (const FilterRange& r : row.filter)
        for (const FilterRange& s : column.filter) taps.push_back({r, s});
    }
  }
  merged = p.upsample > 1;
  const auto add_weight = [&](int64_t r, int64_t s) {
    tap_weights.push_back(r * p.weight_strides[3] + s * p.weight_strides[4]);
  };
  if (merged) {
    for (int64_t r = 0; r < p.filter_height; ++r)
      for (int64_t s = 0; s < p.filter_width; ++s) add_weight(r, s);
  } else {
    for (const TapFilter& tap : taps) add_weight(tap.rows.begin, tap.columns.begin);
  }
  const int64_t count = static_cast<int64_t>(tap_weights.size());
  tap_at.assign(tap_weights.size(), -1);
  for (int64_t t = 0; t < count && !tap_at.empty(); ++t) {
    const int64_t at = tap_weights[t];
    if (at >= 0 && at < count && tap_at[at] < 0)
      tap_at[at] = static_cast<int32_t>(t);
    else
      tap_at.clear();
  }
}

}  // namespace tdc
