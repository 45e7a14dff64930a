// How forward and dgrad are cut into tasks: chunks of pixels by ranges of panels.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_panels.h"

namespace tdc {

constexpr int64_t kLeastPixels = 64;  // of a chunk: fewer would leave tiles of image corners too small

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct GatherTask {
  int64_t group, sample_begin, sample_end, row_begin, row_end, panel_begin, panel_end;
};

class GatherPlan {
 public:
  // Everything but the tasks. Tells `panels`, which were reset, how wide the experts are.
  void set(const Conv2dProblem& problem, const GatherGeometry& geometry, PackedPanels& panels, bool dgrad,
           bool sample_bias);
  // The tasks of the panels' current wave.
  void set_tasks();

  const std::vector<GatherTask>& tasks() const { return tasks_; }
  const std::vector<int64_t>& costs() const { return costs_; }
  int threads() const { return threads_; }
  int64_t live_source(int64_t g) const { return dgrad_ ? p_->live_out(g) : p_->live_in(g); }
  int64_t live_dest(int64_t g) const { return dgrad_ ? p_->live_in(g) : p_->live_out(g); }

 private:
  void set_chunks(bool sample_bias);
  void add_group(int64_t group);
  void add_task(const GatherTask& task);

  const Conv2dProblem* p_ = nullptr;
  const GatherGeometry* geo_ = nullptr;
  PackedPanels* panels_ = nullptr;
  bool dgrad_ = false;
  int threads_ = 1;
  int64_t depth_ = 1, lanes_ = 1;  // the widest group's
  int64_t chunk_rows_ = 0, chunk_samples_ = 0, panel_ranges_ = 1;
  std::vector<GatherTask> tasks_;
  std::vector<int64_t> costs_;
};

}  // namespace tdc
