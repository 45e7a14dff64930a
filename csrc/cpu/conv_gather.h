// Forward and dgrad as one problem: every destination pixel gathers source pixels through a list of taps.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv.h"

namespace tdc {

struct GatherTap {
  int64_t row, column;   // source = destination index * source_step + this
  int64_t weight;        // element offset of the filter tap
};

// Destination pixels (i * dest_step + phase) that share a list of taps: taps [tap_begin, tap_end).
struct GatherPhase {
  int64_t row, column;   // phase
  int64_t rows, columns; // how many destination rows and columns it has
  int tap_begin, tap_end;
};

struct GatherGeometry {
  int64_t source_height, source_width, source_channels;
  int64_t dest_height, dest_width, dest_channels;
  int64_t source_step_h, source_step_w, dest_step_h, dest_step_w;
  int64_t rows, columns;  // of the index space: ceil(destination / step)
  int64_t lane_stride, depth_stride;  // of the weight along destination and source channels
  int64_t min_row, max_row, min_column, max_column;  // over all taps; 0 when there is none
  std::vector<GatherTap> taps;
  std::vector<GatherPhase> phases;
  std::vector<int64_t> tap_weights;  // taps[t].weight
  std::vector<int32_t> tap_at;       // where memory offset m's tap stands, if the taps fill 0 .. n - 1; else empty

  // y from x: stride steps through the source.
  void set_forward(const Conv2dProblem& problem);
  // dx from dy: stride splits the destination into phases, each with the taps that reach it.
  void set_dgrad(const Conv2dProblem& problem);

 private:
  void finish();
};

}  // namespace tdc
