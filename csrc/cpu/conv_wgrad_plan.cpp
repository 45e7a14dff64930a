#include "cpu/conv_wgrad_plan.h"

namespace tdc {
namespace {

constexpr int64_t kChunkPixels = 128;                 // a panel of dy and a block of x of one chunk fit in L1 together
constexpr int64_t kOneTapPixels = 64;                 // the same with one tap, where neither need be copied
constexpr int64_t kInPlaceLimit = int64_t{64} << 10;  // bytes of all channels of these pixels, if none is copied
constexpr int64_t kSumsLimit = int64_t{384} << 10;    // bytes of sums per task: they stay in L2
constexpr int64_t kPartialLimit = int64_t{4} << 20;   // bytes of partial sums
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kPanelTaps = 9;  // a copied block of x is used for at least this many pairs of a tap and a panel,
constexpr int64_t kDyLimit = int64_t{256} << 10;  // unless the chunk's dy would take more bytes than this

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void WgradPlan::make(const Conv2dProblem& problem, int vector_lanes, bool dweight, bool biases) {
  problem_ = &problem;
  vector_lanes_ = vector_lanes;
  panel_lanes = vector_lanes * kPanelVectors;
  tiles.clear(), tasks.clear(), taps.clear(), bias_tasks.clear(), order.clear(), costs.clear();
  macs = partial_floats = tile_counters = 0;
  plan_taps();
  plan_chunks();
  plan_experts();
  if (dweight) plan_tiles();
  if (biases) plan_biases();
  plan_order(dweight);
}

void WgradPlan::plan_taps() {
  const Conv2dProblem& p = *problem_;
  for (int64_t r = 0; r < p.filter_height; ++r)
    for (int64_t s = 0; s < p.filter_width; ++s) taps.push_back(r * p.weight_strides[3] + s * p.weight_strides[4]);
  rows.set_forward(p.height, p.out_height(), p.filter_height, p.stride_height, p.pad_height, p.upsample);
  columns.set_forward(p.width, p.out_width(), p.filter_width, p.stride_width, p.pad_width, p.upsample);
  sum_taps.clear();
  for (const AxisPhase& row : rows.phases)
    for (const AxisPhase& column : columns.phases)
      for (size_t r = 0; r < row.taps.size(); ++r)
        for (size_t s = 0; s < column.taps.size(); ++s)
          sum_taps.push_back({row.phase, column.phase, row.taps[r], column.taps[s], {row.filter[r], column.filter[s]}});
}

void WgradPlan::plan_chunks() {
  out_height = problem_->out_height(), out_width = problem_->out_width();
  image_ = out_height * out_width;
  in_place = fits_in_place();
  // Not by `in_place`, which other groups' widths decide: an expert's sums have the same order beside other experts.
  const int64_t pixels = num_taps() == 1 && problem_->dtype == DType::kFloat32 ? kOneTapPixels : kChunkPixels;
  chunk_samples_ = row_ranges_ = 1;
  if (image_ >= pixels)
    row_ranges_ = ceil_div(out_height, std::max<int64_t>(1, pixels / out_width));
  else
    chunk_samples_ = std::max<int64_t>(1, pixels / image_);
}

// With one tap, a copy would be read no more often than the original. Copies convert bf16, join two inputs and put
// zeros past a live width within a vector.
bool WgradPlan::fits_in_place() const {
  const Conv2dProblem& p = *problem_;
  if (num_taps() != 1 || p.dtype != DType::kFloat32 || p.x2_channels) return false;
  if (std::max(kOneTapPixels, out_width) * (p.in_channels + p.out_channels) * 4 > kInPlaceLimit) return false;
  for (int64_t g = 0; g < p.num_groups; ++g)
    if (p.live_out(g) % vector_lanes_ != 0) return false;
  return true;
}

int64_t WgradPlan::group_chunks(int64_t group) const {
  return ceil_div(problem_->offsets[group + 1] - problem_->offsets[group], chunk_samples_) * row_ranges_;
}

WgradPlan::Chunk WgradPlan::chunk(int64_t group, int64_t index) const {
  const int64_t first = problem_->offsets[group], samples = problem_->offsets[group + 1] - first;
  const int64_t sample_ranges = ceil_div(samples, chunk_samples_);
  const int64_t i = index % sample_ranges, j = index / sample_ranges;
  return {group, first + samples * i / sample_ranges, first + samples * (i + 1) / sample_ranges,
          out_height * j / row_ranges_, out_height * (j + 1) / row_ranges_};
}

void WgradPlan::plan_experts() {
  const Conv2dProblem& p = *problem_;
  experts.assign(p.num_experts, {});
  groups.resize(p.num_experts);
  for (auto& list : groups) list.clear();
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const int64_t samples = p.offsets[g + 1] - p.offsets[g];
    if (samples == 0) continue;
    Expert& e = experts[p.expert(g)];
    e.lanes = std::max(e.lanes, p.live_out(g));
    e.depth = std::max(e.depth, p.live_in(g));
    e.samples += samples;
    e.chunks += group_chunks(g);
    groups[p.expert(g)].push_back(static_cast<int32_t>(g));
    macs += samples * image_ * num_taps() / num_phases() * p.live_in(g) * p.live_out(g);
  }
  for (Expert& e : experts)
    if (e.depth == 0 || e.lanes == 0) e.depth = e.lanes = 0;
}

void WgradPlan::plan_tiles() {
  int64_t total = 0;  // products of a chunk, a panel and a block
  for (const Expert& e : experts) total += e.chunks * panels(e) * blocks(e);
  const int64_t per_task = std::max<int64_t>(1, total / kTasksWanted);
  const int64_t panel_bytes = std::max(kChunkPixels, out_width) * panel_lanes * 4;
  const int64_t tile_panels = std::max<int64_t>(1, std::min(ceil_div(kPanelTaps, num_taps()), kDyLimit / panel_bytes));
  for (int64_t expert = 0; expert < problem_->num_experts; ++expert) {
    const Expert& e = experts[expert];
    const int64_t all = blocks(e);
    if (all == 0) continue;
    for (int64_t panel = 0; panel < panels(e); panel += tile_panels) {
      const int64_t panel_end = std::min(panels(e), panel + tile_panels), width = panel_end - panel;
      const int64_t wanted = ceil_div(e.chunks * all * width, per_task);  // tasks
      const int64_t most_blocks = std::max<int64_t>(1, kSumsLimit / (4 * block_rows(1) * panel_lanes * width));
      // Tiles of different blocks share no sums. With few taps, copying x costs more: the splits of one tile copy less.
      const int64_t wanted_tiles = tile_panels > 1 ? ceil_div(wanted, e.chunks) : wanted;
      const int64_t count = std::min(all, std::max(wanted_tiles, ceil_div(all, most_blocks)));
      for (int64_t i = 0; i < count; ++i) {
        WeightTile tile = {expert, panel,          panel_end,    all * i / count, all * (i + 1) / count,
                           1,      partial_floats, tile_counters};
        const int64_t floats = tile_floats(tile);
        tile.splits = std::min(e.chunks, std::max<int64_t>(1, ceil_div(wanted, count)));
        if (tile.splits > 1)
          tile.splits = std::max<int64_t>(1, std::min(tile.splits, (kPartialLimit / 4 - partial_floats) / floats));
        if (tile.splits > 1) partial_floats += tile.splits * floats, ++tile_counters;
        for (int64_t split = 0; split < tile.splits; ++split)
          tasks.push_back({static_cast<int64_t>(tiles.size()), split});
        tiles.push_back(tile);
      }
    }
  }
}

void WgradPlan::plan_biases() {
  for (int64_t expert = 0; expert < problem_->num_experts; ++expert) {
    const int64_t splits = std::max<int64_t>(1, std::min(kBiasSplits, experts[expert].samples));
    for (int64_t split = 0; split < splits; ++split) bias_tasks.push_back({expert, split, splits});
  }
}

void WgradPlan::plan_order(bool dweight) {
  const auto add = [&](int64_t task, int64_t cost) { order.push_back(task), costs.push_back(cost); };
  const int64_t num_tasks = static_cast<int64_t>(tasks.size()), num_biases = static_cast<int64_t>(bias_tasks.size());
  int64_t task = 0, bias = 0;
  for (int64_t expert = 0; expert < problem_->num_experts; ++expert) {
    const int64_t chunks = experts[expert].chunks;
    for (; task < num_tasks && tiles[tasks[task].tile].expert == expert; ++task) {
      const WeightTile& tile = tiles[tasks[task].tile];
      const int64_t products = (tile.panel_end - tile.panel_begin) * (tile.block_end - tile.block_begin) * num_taps();
      add(task, chunks * products * 64 / (tile.splits * num_phases()) + 1);
    }
    for (; bias < num_biases && bias_tasks[bias].expert == expert; ++bias)
      add(num_tasks + bias, chunks * 8 / bias_tasks[bias].splits + 1);
    if (dweight) add(num_tasks + num_biases + expert, 1);
  }
}

}  // namespace tdc
