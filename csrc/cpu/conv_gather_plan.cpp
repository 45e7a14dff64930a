#include "cpu/conv_gather_plan.h"

#include <algorithm>

namespace tdc {
namespace {

constexpr int64_t kSourceLimit = int64_t{192} << 10;  // bytes of source per task: it shares L2 with a panel
constexpr int64_t kWeightLimit = int64_t{640} << 10;  // bytes of packed weights that chunk after chunk finds in L2
constexpr int64_t kChunkPixels = 128;
constexpr int64_t kTasksWanted = 32;                 // enough for an even load, from shapes alone
constexpr int64_t kParallelMacs = int64_t{1} << 19;  // below, waking a thread costs more than it saves

}  // namespace

void GatherPlan::set(const Conv2dProblem& problem, const GatherGeometry& geometry, PackedPanels& panels, bool dgrad,
                     bool sample_bias) {
  p_ = &problem, geo_ = &geometry, panels_ = &panels, dgrad_ = dgrad;
  depth_ = lanes_ = 1;
  int64_t macs = 0;
  for (int64_t g = 0; g < p_->num_groups; ++g) {
    const int64_t samples = p_->offsets[g + 1] - p_->offsets[g];
    if (samples == 0) continue;
    panels_->widen(p_->expert(g), live_dest(g), live_source(g));
    depth_ = std::max(depth_, live_source(g)), lanes_ = std::max(lanes_, live_dest(g));
    macs += samples * geo_->rows.indices * geo_->columns.indices * geo_->num_taps() * live_source(g) * live_dest(g);
  }
  threads_ = macs < kParallelMacs ? 1 : problem.threads;
  set_chunks(sample_bias);
}

// Chunks of whole small images or of rows of a large one, sized by shapes alone.
void GatherPlan::set_chunks(bool sample_bias) {
  const int64_t rows = geo_->rows.indices, image = rows * geo_->columns.indices;
  const int64_t pixels = p_->batch * image;
  const int64_t wanted = std::min(kChunkPixels, std::max<int64_t>(kLeastPixels, pixels / kTasksWanted));
  const int64_t line = geo_->columns.source_size * depth_ * 4;  // bytes of a source row in fp32
  chunk_samples_ = 1;
  chunk_rows_ = rows;
  if (image >= wanted) {
    int64_t most_rows = std::max<int64_t>(1, wanted / geo_->columns.indices);
    const int64_t extra = geo_->rows.max_tap - geo_->rows.min_tap;
    while (most_rows > 1 && ((most_rows - 1) * geo_->rows.source_step + extra + 1) * line > kSourceLimit) --most_rows;
    chunk_rows_ = ceil_div(rows, ceil_div(rows, most_rows));
  } else {
    const int64_t samples = std::min(wanted / image, kSourceLimit / (geo_->rows.source_size * line));
    chunk_samples_ = std::max<int64_t>(1, samples);
    if (sample_bias) chunk_samples_ = std::max<int64_t>(1, std::min(chunk_samples_, (int64_t{1} << 15) / lanes_));
  }
  // With few chunks, the panels are divided among tasks as well.
  int64_t chunks = 0;
  for (int64_t g = 0; g < p_->num_groups; ++g)
    chunks += ceil_div(p_->offsets[g + 1] - p_->offsets[g], chunk_samples_) * ceil_div(rows, chunk_rows_);
  panel_ranges_ = ceil_div(kTasksWanted, std::max<int64_t>(chunks, 1));
}

void GatherPlan::set_tasks() {
  tasks_.clear();
  costs_.clear();
  for (int64_t g = 0; g < p_->num_groups; ++g)
    if (p_->expert(g) >= panels_->first_expert() && p_->expert(g) <= panels_->last_expert()) add_group(g);
}

void GatherPlan::add_group(int64_t g) {
  const PackedPanels::Expert& e = panels_->expert(p_->expert(g));
  const int64_t total = panels_->count(live_dest(g));
  const int64_t begin = std::min(e.begin, total), end = std::min(e.end, total);
  if (begin == end && !(total == 0 && e.begin == 0)) return;
  const int64_t weights = geo_->num_taps() * panels_->tap_rows(e) * panels_->lanes_per_panel() * 4 * (end - begin);
  const int64_t wanted = std::max(panel_ranges_, ceil_div(weights, kWeightLimit));
  const int64_t ranges = std::max<int64_t>(1, std::min(wanted, end - begin));
  const int64_t first = p_->offsets[g], samples = p_->offsets[g + 1] - first;
  const int64_t sample_ranges = ceil_div(samples, chunk_samples_),
                row_ranges = ceil_div(geo_->rows.indices, chunk_rows_);
  // All chunks with one range of panels, then all with the next.
  for (int64_t s = 0; s < ranges; ++s)
    for (int64_t i = 0; i < sample_ranges; ++i)
      for (int64_t b = 0; b < row_ranges; ++b)
        add_task({g, first + samples * i / sample_ranges, first + samples * (i + 1) / sample_ranges,
                  geo_->rows.indices * b / row_ranges, geo_->rows.indices * (b + 1) / row_ranges,
                  begin + (end - begin) * s / ranges, begin + (end - begin) * (s + 1) / ranges});
}

void GatherPlan::add_task(const GatherTask& task) {
  tasks_.push_back(task);
  panels_->expect(p_->expert(task.group), task.panel_begin, task.panel_end);
  const int64_t rows = (task.sample_end - task.sample_begin) * (task.row_end - task.row_begin);
  costs_.push_back(rows * (live_source(task.group) + 4) * (task.panel_end - task.panel_begin + 1));
}

}  // namespace tdc
