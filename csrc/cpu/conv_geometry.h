// Forward and dgrad as one problem: every destination pixel gathers source pixels through a list of taps.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv.h"

namespace tdc {

// Destination indices [begin, end) of one axis whose taps [tap_begin, tap_end) stay inside the source; the others
// would only add zeros from the padding and are left out.
struct AxisRun {
  int64_t begin, end;
  int tap_begin, tap_end;
};

// Adjacent rows (or columns) of the filter that meet the same source position: more than one only if upsampled.
struct FilterRange {
  int64_t begin, end;
};

// One axis of destination positions (index * dest_step + phase) that share a list of taps:
// source position = index * source_step + tap.
struct AxisPhase {
  int64_t phase;
  std::vector<int64_t> taps;
  std::vector<FilterRange> filter;  // of each tap
  std::vector<AxisRun> runs;
};

struct Axis {
  int64_t source_size, dest_size, source_step, dest_step;
  int64_t indices;           // ceil(dest_size / dest_step)
  int64_t min_tap, max_tap;  // over all phases
  std::vector<AxisPhase> phases;

  // y from x: stride steps through the source; upsampling splits the destination into phases.
  void set_forward(int64_t source, int64_t dest, int64_t filter, int64_t stride, int64_t pad, int64_t upsample);
  // dx from dy: stride splits the destination into phases, each with the taps that reach it.
  void set_dgrad(int64_t source, int64_t dest, int64_t filter, int64_t stride, int64_t pad, int64_t upsample);
  // Whether row tiles serve these columns: three adjacent taps, and as many positions on both sides.
  bool fits_row_tiles() const;
  // Whether every position meets the same position of the source, and no other.
  bool is_identity() const;

 private:
  void finish();
};

// The part of the filter whose weights a tap adds.
struct TapFilter {
  FilterRange rows, columns;
};

struct GatherGeometry {
  Axis rows, columns;
  int64_t source_channels, dest_channels;
  int64_t lane_stride, depth_stride;  // of the weight along destination and source channels
  // Taps in packed order: by phase (row phase slowest), then row, then column.
  std::vector<int64_t> first_tap;  // of each phase
  std::vector<TapFilter> taps;
  bool merged;                       // whether taps may add several weights of the filter
  std::vector<int64_t> tap_weights;  // element offset of each tap; if merged, of each weight of the filter, by row
  std::vector<int32_t> tap_at;       // index in tap_weights of offset m, if those fill 0 .. n - 1; else empty

  void set(const Conv2dProblem& problem, bool dgrad);
  int64_t num_taps() const { return static_cast<int64_t>(taps.size()); }
};

}  // namespace tdc
