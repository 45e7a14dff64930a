// The plan of wgrad: which sums of dweight and of the biases each task computes, and over which pixels. It follows from
// the problem alone, so that the result depends on neither the number of threads nor their timing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/conv_kernels.h"

namespace tdc {

constexpr int64_t kDepthBlock = 16;  // input channels of a block: a cache line of fp32
constexpr int64_t kBiasSplits = 8;

class WgradPlan {
 public:
  // The widest of an expert's groups, and all of its samples.
  struct Expert {
    int64_t lanes = 0, depth = 0, samples = 0, chunks = 0;
  };

  struct WeightTile {
    int64_t expert, panel_begin, panel_end, block_begin, block_end;
    int64_t splits;            // tasks that share its chunks
    int64_t partial, counter;  // with several splits: first float of its partial sums, number of its counter
  };

  // A sum over the output pixels of one phase: their dy times the input pixel `tap` away. Upsampled, it is part of the
  // gradient of every weight in its range of the filter; otherwise it is the gradient of one.
  struct SumTap {
    int64_t row_phase, column_phase, row_tap, column_tap;
    TapFilter filter;
  };

  struct Task {
    int64_t tile, split;
  };

  struct BiasTask {
    int64_t expert, split, splits;
  };

  struct Chunk {
    int64_t group, sample_begin, sample_end, row_begin, row_end;
    int64_t samples() const { return sample_end - sample_begin; }
    int64_t rows() const { return row_end - row_begin; }
  };

  // dweight, biases: whether these gradients are wanted.
  void make(const Conv2dProblem& problem, int vector_lanes, bool dweight, bool biases);

  std::vector<Expert> experts;
  std::vector<std::vector<int32_t>> groups;  // of each expert, in order
  Axis rows, columns;                        // from output to input, as in the forward
  std::vector<SumTap> sum_taps;
  std::vector<int64_t> taps;  // element offsets in a weight of the taps of the filter
  std::vector<WeightTile> tiles;
  std::vector<Task> tasks;
  std::vector<BiasTask> bias_tasks;
  // Numbers of tasks, then of bias_tasks, then of the experts, whose dead channels are cleared. One expert follows the
  // other, so that its dy is in the cache when it is read for the biases.
  std::vector<int64_t> order;
  std::vector<int64_t> costs;  // in this order
  int64_t macs = 0;            // of all tasks
  int64_t partial_floats = 0;  // partial sums of all tiles with several splits
  int64_t tile_counters = 0;   // tiles with several splits
  int64_t panel_lanes = 0;     // of a full panel
  bool in_place = false;       // products read x and dy where they are; otherwise copies of them
  int64_t out_height = 0, out_width = 0;

  int64_t num_taps() const { return static_cast<int64_t>(sum_taps.size()); }
  int64_t num_phases() const { return rows.dest_step * columns.dest_step; }
  int64_t blocks(const Expert& e) const { return (e.depth + kDepthBlock - 1) / kDepthBlock; }
  int64_t block_depth(const Expert& e, int64_t block) const {
    return std::min(kDepthBlock, e.depth - block * kDepthBlock);
  }
  int64_t panels(const Expert& e) const { return (e.lanes + panel_lanes - 1) / panel_lanes; }
  // Floats per row of a panel's sums: whole vectors, fewer in an expert's last panel.
  int64_t panel_row(const Expert& e, int64_t panel) const {
    const int64_t vectors = (e.lanes - panel * panel_lanes + vector_lanes_ - 1) / vector_lanes_;
    return std::min(panel_lanes, vectors * vector_lanes_);
  }
  // Rows of sums of `blocks` blocks; all blocks but an expert's last are full.
  int64_t block_rows(int64_t blocks) const { return blocks * kDepthBlock * num_taps(); }
  // First float of a panel's sums in its tile; all panels but an expert's last are full.
  int64_t panel_sums(const WeightTile& tile, int64_t panel) const {
    return block_rows(tile.block_end - tile.block_begin) * (panel - tile.panel_begin) * panel_lanes;
  }
  int64_t tile_floats(const WeightTile& tile) const {
    const int64_t last = tile.panel_end - 1;
    return panel_sums(tile, last) +
           block_rows(tile.block_end - tile.block_begin) * panel_row(experts[tile.expert], last);
  }
  int64_t group_chunks(int64_t group) const;
  // Chunks of the same rows follow each other, so that they can share a list of pixel pairs.
  Chunk chunk(int64_t group, int64_t index) const;

 private:
  void plan_taps();
  void plan_chunks();
  bool fits_in_place() const;
  void plan_experts();
  void plan_tiles();
  void plan_biases();
  void plan_order(bool dweight);

  const Conv2dProblem* problem_ = nullptr;
  int64_t vector_lanes_ = 1, image_ = 0;
  int64_t chunk_samples_ = 1, row_ranges_ = 1;  // samples of a chunk, or chunks of a sample
};

}  // namespace tdc
