// wgrad: dweight[k, c, tap] = sum over pixels of x[pixel + tap, c] * dy[pixel, k].
//
// Each task of the plan adds the products of its chunks into one weight tile. Of a tile's splits, the one that finishes
// last adds all partial sums in order.
#include <atomic>
#include <cstring>
#include <new>

#include "cpu/conv_scratch.h"
#include "cpu/conv_shares.h"
#include "cpu/conv_wgrad_plan.h"

namespace tdc {
namespace {

using Expert = WgradPlan::Expert;
using WeightTile = WgradPlan::WeightTile;
using Chunk = WgradPlan::Chunk;

constexpr int64_t kParallelMacs = int64_t{1} << 19;  // below, waking a thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Workspace {  // of the calling thread, read by all
  WgradPlan plan;
  WorkShares shares;
  Scratch partial_sums, bias_sums, counters;
};

struct LocalMemory {  // of each thread
  Scratch source, dy, sums, pairs, bias, filter;
};

struct Operands {
  const void *x, *x2, *dy;
  void *dweight, *dbias, *dsample_bias;
};

class Wgrad {
 public:
  Wgrad(const Conv2dProblem& problem, const Operands& operands, Workspace& work)
      : p_(problem), op_(operands), work_(work), plan_(work.plan), kernels_(TDC_ISA_CALL(conv_kernels)) {
    type_ = static_cast<int>(p_.dtype);
    element_ = p_.dtype == DType::kFloat32 ? 4 : 2;
    work_.plan.make(p_, kernels_.lanes, op_.dweight, op_.dbias || op_.dsample_bias);
    panel_ = plan_.panel_lanes;
    out_h_ = plan_.out_height, out_w_ = plan_.out_width;
    taps_ = plan_.num_taps();
    x_step_ = plan_.in_place ? p_.in_channels : kDepthBlock;
    dy_step_ = plan_.in_place ? p_.out_channels : panel_;
  }

  void run() {
    partial_sums_ = work_.partial_sums.get<float>(plan_.partial_floats + 1);
    if (!plan_.bias_tasks.empty())
      bias_sums_ = work_.bias_sums.get<float>(p_.num_experts * kBiasSplits * p_.out_channels);
    const int64_t counters = plan_.tile_counters + p_.num_experts;
    counters_ = work_.counters.get<std::atomic<int64_t>>(counters);
    for (int64_t i = 0; i < counters; ++i) new (counters_ + i) std::atomic<int64_t>(0);

    const int64_t products = static_cast<int64_t>(plan_.tasks.size());
    const int64_t sums = products + static_cast<int64_t>(plan_.bias_tasks.size());
    work_.shares.run(plan_.costs, plan_.macs < kParallelMacs ? 1 : p_.threads, [&](int64_t index, int) {
      const int64_t task = plan_.order[index];
      if (task < products)
        multiply(plan_.tasks[task]);
      else if (task < sums)
        sum_bias(plan_.bias_tasks[task - products]);
      else
        zero_dead(task - sums);
    });
  }

 private:
  static LocalMemory& local() {
    static thread_local LocalMemory memory;
    return memory;
  }

  void multiply(const WgradPlan::Task& task) const {
    const WeightTile& tile = plan_.tiles[task.tile];
    const Expert& e = plan_.experts[tile.expert];
    LocalMemory& memory = local();
    const int64_t floats = plan_.tile_floats(tile);
    float* sums = tile.splits > 1 ? partial_sums_ + tile.partial + task.split * floats : memory.sums.get<float>(floats);
    std::memset(sums, 0, floats * sizeof(float));
    const int64_t begin = e.chunks * task.split / tile.splits, end = e.chunks * (task.split + 1) / tile.splits;
    PixelLists lists;
    int64_t first = 0;  // number of the group's first chunk among the expert's
    for (int32_t g : plan_.groups[tile.expert]) {
      const int64_t chunks = plan_.group_chunks(g);
      for (int64_t c = std::max(begin, first); c < std::min(end, first + chunks); ++c)
        multiply_chunk(tile, plan_.chunk(g, c - first), sums, memory, lists);
      first += chunks;
    }
    if (tile.splits > 1) {
      if (counters_[tile.counter].fetch_add(1, std::memory_order_acq_rel) + 1 < tile.splits) return;
      sums = partial_sums_ + tile.partial;
      for (int64_t split = 1; split < tile.splits; ++split) kernels_.add(sums + split * floats, sums, floats);
    }
    unpack(tile, sums);
  }

  // For every tap, the output pixels of a chunk whose input pixel lies inside the image; the others multiply padding.
  struct PixelLists {
    int64_t samples = -1, row_begin = -1, row_end = -1;
    int64_t input_begin = 0, input_end = 0;  // input rows that are read
    PixelPair* pairs = nullptr;              // tap t: [t * capacity, t * capacity + counts[t])
    int64_t* counts = nullptr;
    int64_t capacity = 0;
  };

  void list_pixels(const Chunk& chunk, LocalMemory& memory, PixelLists& lists) const {
    const int64_t samples = chunk.samples(), rows = chunk.rows();
    if (lists.samples == samples && lists.row_begin == chunk.row_begin && lists.row_end == chunk.row_end) return;
    lists.samples = samples, lists.row_begin = chunk.row_begin, lists.row_end = chunk.row_end;
    const Axis &down = plan_.rows, &across = plan_.columns;
    const int64_t first_row = chunk.row_begin / down.dest_step * down.source_step + down.min_tap;
    const int64_t last_row = (chunk.row_end - 1) / down.dest_step * down.source_step + down.max_tap;
    lists.input_begin = std::max<int64_t>(0, first_row);
    lists.input_end = std::max(lists.input_begin, std::min(p_.height, last_row + 1));
    lists.capacity = samples * rows * out_w_;
    char* storage =
        static_cast<char*>(memory.pairs.reserve(taps_ * (sizeof(int64_t) + lists.capacity * sizeof(PixelPair))));
    lists.counts = reinterpret_cast<int64_t*>(storage);
    lists.pairs = reinterpret_cast<PixelPair*>(storage + taps_ * sizeof(int64_t));
    const int64_t input_rows = plan_.in_place ? p_.height : lists.input_end - lists.input_begin;
    const int64_t input_image = input_rows * p_.width;
    for (int64_t t = 0; t < taps_; ++t) {
      const WgradPlan::SumTap& tap = plan_.sum_taps[t];
      const int64_t s = tap.column_tap, columns = ceil_div(out_w_ - tap.column_phase, across.dest_step);
      // Output columns of the phase whose input column is inside.
      const int64_t j_begin = s < 0 ? ceil_div(-s, across.source_step) : 0;
      const int64_t j_end = s >= p_.width ? 0 : std::min(columns, (p_.width - 1 - s) / across.source_step + 1);
      PixelPair* pair = lists.pairs + t * lists.capacity;
      for (int64_t n = 0; n < samples; ++n) {
        for (int64_t i = chunk.row_begin; i < chunk.row_end; ++i) {
          const int64_t y = i / down.dest_step * down.source_step + tap.row_tap;
          if (i % down.dest_step != tap.row_phase || y < 0 || y >= p_.height) continue;
          const int64_t x = n * input_image + (y - lists.input_begin) * p_.width + s;
          const int64_t dy = (n * rows + i - chunk.row_begin) * out_w_ + tap.column_phase;
          for (int64_t j = j_begin; j < j_end; ++j)
            *pair++ = {static_cast<int32_t>((x + j * across.source_step) * x_step_),
                       static_cast<int32_t>((dy + j * across.dest_step) * dy_step_)};
        }
      }
      lists.counts[t] = pair - (lists.pairs + t * lists.capacity);
    }
  }

  void multiply_chunk(const WeightTile& weight_tile, const Chunk& chunk, float* sums, LocalMemory& memory,
                      PixelLists& lists) const {
    const Expert& e = plan_.experts[weight_tile.expert];
    const int64_t live_panels = std::min(weight_tile.panel_end, ceil_div(p_.live_out(chunk.group), panel_));
    if (live_panels <= weight_tile.panel_begin) return;
    list_pixels(chunk, memory, lists);
    const bool in_place = plan_.in_place;
    const float* dy = in_place ? find_dy(weight_tile, chunk) : copy_dy(weight_tile, chunk, live_panels, memory);
    const int64_t dy_panel = in_place ? panel_ : chunk.samples() * chunk.rows() * out_w_ * panel_;
    for (int64_t block = weight_tile.block_begin; block < weight_tile.block_end; ++block) {
      const int64_t live = std::min(kDepthBlock, p_.live_in(chunk.group) - block * kDepthBlock);
      if (live <= 0) break;
      const float* source =
          in_place ? find_source(chunk, block, lists) : copy_source(chunk, block, live, memory, lists);
      const int64_t depth = plan_.block_depth(e, block), tiles = ceil_div(live, kernels_.pixels);
      for (int64_t panel = weight_tile.panel_begin; panel < live_panels; ++panel) {
        OuterTile tile;
        tile.vectors = static_cast<int>(ceil_div(live_lanes(chunk, panel), kernels_.lanes));
        tile.dy = dy + (panel - weight_tile.panel_begin) * dy_panel;
        tile.row = plan_.panel_row(e, panel);
        float* to =
            sums + plan_.panel_sums(weight_tile, panel) + plan_.block_rows(block - weight_tile.block_begin) * tile.row;
        for (int64_t t = 0; t < taps_; ++t, to += depth * tile.row) {
          tile.pixels = lists.pairs + t * lists.capacity;
          tile.num_pixels = lists.counts[t];
          if (tile.num_pixels == 0) continue;
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t begin = live * i / tiles;
            tile.source = source + begin;
            tile.rows = static_cast<int>(live * (i + 1) / tiles - begin);
            tile.sums = to + begin * tile.row;
            kernels_.outer(tile);
          }
        }
      }
    }
  }

  // Output channels of a panel that are live in the chunk's group.
  int64_t live_lanes(const Chunk& chunk, int64_t panel) const {
    return std::min<int64_t>(panel_, p_.live_out(chunk.group) - panel * panel_);
  }

  // The same as copy_dy and copy_source give, in the tensors themselves.
  const float* find_dy(const WeightTile& weight_tile, const Chunk& chunk) const {
    const int64_t pixel = (chunk.sample_begin * out_h_ + chunk.row_begin) * out_w_;
    return static_cast<const float*>(op_.dy) + pixel * p_.out_channels + weight_tile.panel_begin * panel_;
  }
  const float* find_source(const Chunk& chunk, int64_t block, const PixelLists& lists) const {
    const int64_t pixel = (chunk.sample_begin * p_.height + lists.input_begin) * p_.width;
    return static_cast<const float*>(op_.x) + pixel * p_.in_channels + block * kDepthBlock;
  }

  // The chunk's dy, panel by panel, pixels of panel_ floats: whole vectors of live lanes, zero past the live width.
  const float* copy_dy(const WeightTile& weight_tile, const Chunk& chunk, int64_t live_panels,
                       LocalMemory& memory) const {
    const int64_t pixels = chunk.rows() * out_w_;
    float* to = memory.dy.get<float>((live_panels - weight_tile.panel_begin) * chunk.samples() * pixels * panel_);
    const float* const first = to;
    for (int64_t panel = weight_tile.panel_begin; panel < live_panels; ++panel) {
      const int64_t lanes = live_lanes(chunk, panel);
      for (int64_t n = chunk.sample_begin; n < chunk.sample_end; ++n, to += pixels * panel_) {
        const int64_t pixel = (n * out_h_ + chunk.row_begin) * out_w_;
        kernels_.copy[type_](static_cast<const char*>(op_.dy) + (pixel * p_.out_channels + panel * panel_) * element_,
                             p_.out_channels, to, panel_, pixels, lanes,
                             ceil_div(lanes, kernels_.lanes) * kernels_.lanes);
      }
    }
    return first;
  }

  // A block of live channels of the input rows that the chunk reads; it may straddle the two inputs.
  const float* copy_source(const Chunk& chunk, int64_t block, int64_t live, LocalMemory& memory,
                           const PixelLists& lists) const {
    const int64_t pixels = (lists.input_end - lists.input_begin) * p_.width;
    const int64_t samples = chunk.samples();
    float* to = memory.source.get<float>(samples * pixels * kDepthBlock + 1);
    const auto copy = [&](const void* input, int64_t channels, int64_t first, int64_t count, float* dest) {
      for (int64_t n = 0; n < samples; ++n) {
        const int64_t pixel = ((chunk.sample_begin + n) * p_.height + lists.input_begin) * p_.width;
        kernels_.copy[type_](static_cast<const char*>(input) + (pixel * channels + first) * element_, channels,
                             dest + n * pixels * kDepthBlock, kDepthBlock, pixels, count, count);
      }
    };
    const int64_t begin = block * kDepthBlock, seam = p_.x_channels();
    const int64_t of_x = std::clamp<int64_t>(seam - begin, 0, live);
    if (of_x > 0) copy(op_.x, seam, begin, of_x, to);
    if (of_x < live) copy(op_.x2, p_.x2_channels, begin + of_x - seam, live - of_x, to + of_x);
    return to;
  }

  // Whether a filter's taps lie in memory in order.
  bool taps_dense() const {
    for (int64_t t = 0; t < filter_taps(); ++t)
      if (plan_.taps[t] != t) return false;
    return true;
  }

  int64_t filter_taps() const { return static_cast<int64_t>(plan_.taps.size()); }

  // The gradients of the taps of the filter from the sums of a block, `tap_floats` each: every tap adds the sums that
  // are part of it.
  const float* filter_sums(const float* sums, int64_t tap_floats) const {
    float* const filter = local().filter.get<float>(filter_taps() * tap_floats);
    std::memset(filter, 0, filter_taps() * tap_floats * sizeof(float));
    for (const WgradPlan::SumTap& tap : plan_.sum_taps) {
      for (int64_t r = tap.filter.rows.begin; r < tap.filter.rows.end; ++r)
        for (int64_t s = tap.filter.columns.begin; s < tap.filter.columns.end; ++s)
          kernels_.add(sums, filter + (r * p_.filter_width + s) * tap_floats, tap_floats);
      sums += tap_floats;
    }
    return filter;
  }

  void unpack(const WeightTile& weight_tile, const float* sums) const {
    const Expert& e = plan_.experts[weight_tile.expert];
    PanelUnpack out;
    out.taps = plan_.taps.data();
    out.num_taps = filter_taps();
    out.taps_dense = taps_dense();
    out.lane_stride = p_.weight_strides[1];
    out.depth_stride = p_.weight_strides[2];
    for (int64_t panel = weight_tile.panel_begin; panel < weight_tile.panel_end; ++panel) {
      out.row = plan_.panel_row(e, panel);
      out.lanes = std::min<int64_t>(panel_, e.lanes - panel * panel_);
      for (int64_t block = weight_tile.block_begin; block < weight_tile.block_end; ++block) {
        out.sums =
            sums + plan_.panel_sums(weight_tile, panel) + plan_.block_rows(block - weight_tile.block_begin) * out.row;
        out.depth = plan_.block_depth(e, block);
        if (p_.upsample > 1) out.sums = filter_sums(out.sums, out.depth * out.row);
        const int64_t first = weight_tile.expert * p_.weight_strides[0] + panel * panel_ * out.lane_stride +
                              block * kDepthBlock * out.depth_stride;
        out.weights = static_cast<char*>(op_.dweight) + first * element_;
        kernels_.unpack[type_](out);
      }
    }
  }

  // Exact zeros in dweight past the live channels of an expert.
  void zero_dead(int64_t expert) const {
    const Expert& e = plan_.experts[expert];
    if (e.lanes == p_.out_channels && e.depth == p_.in_channels) return;
    char* base = static_cast<char*>(op_.dweight) + expert * p_.weight_strides[0] * element_;
    const int64_t* stride = p_.weight_strides;
    const bool dense = stride[2] == filter_taps() && taps_dense();
    for (int64_t k = 0; k < p_.out_channels; ++k) {
      const int64_t first = k < e.lanes ? e.depth : 0, dead = p_.in_channels - first;
      char* row = base + (k * stride[1] + first * stride[2]) * element_;
      if (dense) {
        std::memset(row, 0, dead * filter_taps() * element_);
        continue;
      }
      for (int64_t t = 0; t < filter_taps(); ++t) {
        char* tap = row + plan_.taps[t] * element_;
        if (stride[2] == 1)
          std::memset(tap, 0, dead * element_);
        else
          for (int64_t c = 0; c < dead; ++c) std::memset(tap + c * stride[2] * element_, 0, element_);
      }
    }
  }

  void sum_bias(const WgradPlan::BiasTask& task) const {
    const Expert& e = plan_.experts[task.expert];
    const int64_t channels = p_.out_channels;
    float* partial = bias_sums_ + (task.expert * kBiasSplits + task.split) * channels;
    std::memset(partial, 0, channels * sizeof(float));
    float* sums = local().bias.get<float>(channels);
    const int64_t begin = e.samples * task.split / task.splits, end = e.samples * (task.split + 1) / task.splits;
    int64_t first = 0;
    for (int32_t g : plan_.groups[task.expert]) {
      const int64_t samples = p_.offsets[g + 1] - p_.offsets[g], live = p_.live_out(g);
      for (int64_t i = std::max(begin, first); i < std::min(end, first + samples); ++i) {
        const int64_t n = p_.offsets[g] + i - first;
        kernels_.sum_rows[type_](static_cast<const char*>(op_.dy) + n * out_h_ * out_w_ * channels * element_, channels,
                                 out_h_ * out_w_, live, sums);
        if (op_.dsample_bias) {
          char* out = static_cast<char*>(op_.dsample_bias) + n * channels * element_;
          kernels_.narrow[type_](sums, out, live);
          std::memset(out + live * element_, 0, (channels - live) * element_);
        }
        kernels_.add(sums, partial, live);
      }
      first += samples;
    }
    if (!op_.dbias) return;
    if (counters_[plan_.tile_counters + task.expert].fetch_add(1, std::memory_order_acq_rel) + 1 < task.splits) return;
    float* total = bias_sums_ + task.expert * kBiasSplits * channels;
    for (int64_t split = 1; split < task.splits; ++split) kernels_.add(total + split * channels, total, channels);
    kernels_.narrow[type_](total, static_cast<char*>(op_.dbias) + task.expert * channels * element_, channels);
  }

  const Conv2dProblem& p_;
  const Operands op_;
  Workspace& work_;
  const WgradPlan& plan_;
  const ConvKernels& kernels_;
  int type_;
  int64_t panel_, element_, out_h_, out_w_, taps_;
  int64_t x_step_, dy_step_;  // floats from pixel to pixel in the operands of an outer tile
  float *partial_sums_ = nullptr, *bias_sums_ = nullptr;
  std::atomic<int64_t>* counters_ = nullptr;
};

Workspace& workspace() {
  static thread_local Workspace work;
  return work;
}

}  // namespace

void conv2d_wgrad(const Conv2dProblem& problem, const Conv2dInput& input, const void* dy, void* dweight, void* dbias,
                  void* dsample_bias) {
  problem.check();
  Wgrad(problem, {input.x, input.x2, dy, dweight, dbias, dsample_bias}, workspace()).run();
}

}  // namespace tdc
