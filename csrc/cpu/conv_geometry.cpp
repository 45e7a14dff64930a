#include "cpu/conv_geometry.h"

#include <algorithm>

namespace tdc {

void Axis::set_forward(int64_t source, int64_t dest, int64_t filter, int64_t stride, int64_t pad) {
  source_size = source, dest_size = dest, source_step = stride, dest_step = 1;
  phases.resize(1);
  AxisPhase& only = phases[0];
  only.phase = 0;
  only.taps.clear(), only.filter.clear();
  for (int64_t r = 0; r < filter; ++r) only.taps.push_back(r - pad), only.filter.push_back(r);
  finish();
}

void Axis::set_dgrad(int64_t source, int64_t dest, int64_t filter, int64_t stride, int64_t pad) {
  source_size = source, dest_size = dest, source_step = 1, dest_step = stride;
  phases.resize(stride);
  for (int64_t a = 0; a < stride; ++a) {
    AxisPhase& phase = phases[a];
    phase.phase = a;
    phase.taps.clear(), phase.filter.clear();
    // dx[h] sums dy[o] over filter rows r with o * stride + r - pad = h; only exact quotients count.
    for (int64_t r = 0; r < filter; ++r)
      if ((a + pad - r) % stride == 0) phase.taps.push_back((a + pad - r) / stride), phase.filter.push_back(r);
  }
  finish();
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
    rows.set_dgrad(p.out_height(), p.height, p.filter_height, p.stride_height, p.pad_height);
    columns.set_dgrad(p.out_width(), p.width, p.filter_width, p.stride_width, p.pad_width);
  } else {
    rows.set_forward(p.height, p.out_height(), p.filter_height, p.stride_height, p.pad_height);
    columns.set_forward(p.width, p.out_width(), p.filter_width, p.stride_width, p.pad_width);
  }
  first_tap.clear(), tap_weights.clear();
  for (const AxisPhase& row : rows.phases) {
    for (const AxisPhase& column : columns.phases) {
      first_tap.push_back(static_cast<int64_t>(tap_weights.size()));
      for (int64_t r : row.filter)
        for (int64_t s : column.filter) tap_weights.push_back(r * p.weight_strides[3] + s * p.weight_strides[4]);
    }
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
