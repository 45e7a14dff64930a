// The host side of wgrad: dweight[k, c, tap] = sum over pixels of x[pixel + tap, c] * dy[pixel, k].
//
// A unit is a range of panels of output channels by a range of 16-channel input blocks of one expert. Its sums live in
// a buffer that fits the cache; units with many pixels are split into a number of parts fixed by the shapes, and
// whoever finishes last adds the parts in order. So the result depends on neither the threads nor their timing.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/conv.h"
#include "cpu/conv_kernels.h"
#include "cpu/conv_scratch.h"
#include "cpu/conv_shares.h"

namespace tdc {
namespace {

constexpr int64_t kDepthBlock = 16;                 // input channels per block of x: a cache line of fp32
constexpr int64_t kChunkPixels = 128;               // dy panel and x block of a chunk share L1
constexpr int64_t kSumsLimit = int64_t{384} << 10;  // bytes of sums per task: they stay in L2
constexpr int64_t kPartsLimit = int64_t{4} << 20;   // bytes of partial sums
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kPanelTaps = 9;  // a copied block of x serves at least so many products of a tap and a panel,
constexpr int64_t kDyLimit = int64_t{256} << 10;  // if the chunk's dy takes no more bytes than this
constexpr int64_t kBiasParts = 8;
constexpr int64_t kParallelMacs = int64_t{1} << 19;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Expert {
  int64_t lanes = 0, depth = 0, samples = 0, chunks = 0;  // widest of its groups; all of its samples
};

struct Unit {
  int64_t expert, panel_begin, panel_end, block_begin, block_end;
  int64_t parts, memory, counter;  // first float of the partial sums when parts > 1
};

struct Task {
  int64_t unit, part;
};

struct BiasTask {
  int64_t expert, part, parts;
};

struct Workspace {
  std::vector<Expert> experts;
  std::vector<std::vector<int32_t>> groups;  // of each expert, in order
  std::vector<Unit> units;
  std::vector<Task> tasks;
  std::vector<BiasTask> bias_tasks;
  std::vector<int64_t> taps;
  std::vector<int64_t> costs;  // of units' parts, then of bias parts, then of clearing each expert
  WorkShares shares;
  Scratch parts, bias_parts, counters;
};

struct LocalMemory {
  Scratch source, dy, sums, pairs, bias;
};

struct Operands {
  const void *x, *dy;
  void *dweight, *dbias, *dsample_bias;
};

// A piece of one group's pixels: whole samples, or rows of one.
struct Chunk {
  int64_t group, sample_begin, sample_end, row_begin, row_end;
};

class Wgrad {
 public:
  Wgrad(const Conv2dProblem& problem, const Operands& operands, Workspace& work)
      : p_(problem), op_(operands), work_(work), kernels_(TDC_ISA_CALL(conv_kernels)) {
    panel_ = kernels_.lanes * kPanelVectors;
    type_ = static_cast<int>(p_.dtype);
    element_ = p_.dtype == DType::kFloat32 ? 4 : 2;
    out_h_ = p_.out_height(), out_w_ = p_.out_width();
    taps_ = p_.filter_height * p_.filter_width;
    image_ = out_h_ * out_w_;
    if (image_ >= kChunkPixels) {
      bands_ = ceil_div(out_h_, std::max<int64_t>(1, kChunkPixels / out_w_));
      chunk_samples_ = 1;
    } else {
      chunk_samples_ = std::max<int64_t>(1, kChunkPixels / image_);
    }
  }

  void run() {
    plan_experts();
    plan_units();
    plan_bias();
    plan_costs();
    const int64_t products = static_cast<int64_t>(work_.tasks.size());
    const int64_t sums = products + static_cast<int64_t>(work_.bias_tasks.size());
    work_.shares.run(work_.costs, macs_ < kParallelMacs ? 1 : p_.threads, [&](int64_t task) {
      if (task < products)
        multiply(work_.tasks[task]);
      else if (task < sums)
        sum_bias(work_.bias_tasks[task - products]);
      else
        zero_dead(task - sums);
    });
  }

 private:
  int64_t blocks(const Expert& e) const { return ceil_div(e.depth, kDepthBlock); }
  int64_t block_depth(const Expert& e, int64_t block) const {
    return std::min(kDepthBlock, e.depth - block * kDepthBlock);
  }
  int64_t panels(const Expert& e) const { return ceil_div(e.lanes, panel_); }
  int64_t panel_row(const Expert& e, int64_t panel) const {
    return std::min<int64_t>(panel_, ceil_div(e.lanes - panel * panel_, kernels_.lanes) * kernels_.lanes);
  }
  // Rows of sums in so many blocks; all blocks but an expert's last are full.
  int64_t block_rows(int64_t blocks) const { return blocks * kDepthBlock * taps_; }
  // First float of a panel's sums in its unit; all panels but an expert's last are full.
  int64_t panel_sums(const Unit& u, int64_t panel) const {
    return block_rows(u.block_end - u.block_begin) * (panel - u.panel_begin) * panel_;
  }
  int64_t unit_floats(const Unit& u) const {
    const int64_t last = u.panel_end - 1;
    return panel_sums(u, last) + block_rows(u.block_end - u.block_begin) * panel_row(work_.experts[u.expert], last);
  }
  int64_t group_chunks(int64_t g) const { return ceil_div(p_.offsets[g + 1] - p_.offsets[g], chunk_samples_) * bands_; }

  void plan_experts() {
    work_.experts.assign(p_.num_experts, {});
    work_.groups.resize(p_.num_experts);
    for (auto& list : work_.groups) list.clear();
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      const int64_t samples = p_.offsets[g + 1] - p_.offsets[g];
      if (samples == 0) continue;
      Expert& e = work_.experts[p_.expert(g)];
      e.lanes = std::max(e.lanes, p_.live_out(g));
      e.depth = std::max(e.depth, p_.live_in(g));
      e.samples += samples;
      e.chunks += group_chunks(g);
      work_.groups[p_.expert(g)].push_back(static_cast<int32_t>(g));
      macs_ += samples * image_ * taps_ * p_.live_in(g) * p_.live_out(g);
    }
    for (Expert& e : work_.experts)
      if (e.depth == 0 || e.lanes == 0) e.depth = e.lanes = 0;
  }

  void plan_units() {
    work_.units.clear();
    work_.tasks.clear();
    work_.taps.clear();
    for (int64_t r = 0; r < p_.filter_height; ++r)
      for (int64_t s = 0; s < p_.filter_width; ++s)
        work_.taps.push_back(r * p_.weight_strides[3] + s * p_.weight_strides[4]);
    if (!op_.dweight) return;
    int64_t cost = 0;
    for (const Expert& e : work_.experts) cost += e.chunks * panels(e) * blocks(e);
    const int64_t share = std::max<int64_t>(1, cost / kTasksWanted);
    const int64_t panel_bytes = std::max(kChunkPixels, out_w_) * panel_ * 4;
    const int64_t together = std::max<int64_t>(1, std::min(ceil_div(kPanelTaps, taps_), kDyLimit / panel_bytes));
    int64_t floats = 0, counters = 0;
    for (int64_t x = 0; x < p_.num_experts; ++x) {
      const Expert& e = work_.experts[x];
      const int64_t all = blocks(e);
      if (all == 0) continue;
      for (int64_t panel = 0; panel < panels(e); panel += together) {
        const int64_t panel_end = std::min(panels(e), panel + together), width = panel_end - panel;
        const int64_t pieces = ceil_div(e.chunks * all * width, share);
        const int64_t most_blocks = std::max<int64_t>(1, kSumsLimit / (4 * block_rows(1) * panel_ * width));
        // Ranges of blocks share no sums; with few taps, parts that share them copy less.
        const int64_t wanted = together > 1 ? ceil_div(pieces, e.chunks) : pieces;
        const int64_t ranges = std::min(all, std::max(wanted, ceil_div(all, most_blocks)));
        for (int64_t i = 0; i < ranges; ++i) {
          Unit u = {x, panel, panel_end, all * i / ranges, all * (i + 1) / ranges, 1, floats, counters};
          u.parts = std::min(e.chunks, std::max<int64_t>(1, ceil_div(pieces, ranges)));
          if (u.parts > 1) {
            u.parts = std::max<int64_t>(1, std::min(u.parts, (kPartsLimit / 4 - floats) / unit_floats(u)));
            if (u.parts > 1) floats += u.parts * unit_floats(u), ++counters;
          }
          for (int64_t part = 0; part < u.parts; ++part)
            work_.tasks.push_back({static_cast<int64_t>(work_.units.size()), part});
          work_.units.push_back(u);
        }
      }
    }
    parts_ = work_.parts.get<float>(floats + 1);
    first_bias_counter_ = counters;
  }

  void plan_bias() {
    work_.bias_tasks.clear();
    if (op_.dbias || op_.dsample_bias) {
      for (int64_t x = 0; x < p_.num_experts; ++x) {
        const int64_t parts = std::max<int64_t>(1, std::min(kBiasParts, work_.experts[x].samples));
        for (int64_t part = 0; part < parts; ++part) work_.bias_tasks.push_back({x, part, parts});
      }
      bias_parts_ = work_.bias_parts.get<float>(p_.num_experts * kBiasParts * p_.out_channels);
    }
    const int64_t counters = first_bias_counter_ + p_.num_experts;
    counters_ = work_.counters.get<std::atomic<int64_t>>(counters);
    for (int64_t i = 0; i < counters; ++i) new (counters_ + i) std::atomic<int64_t>(0);
  }

  void plan_costs() {
    work_.costs.clear();
    for (const Task& task : work_.tasks) {
      const Unit& u = work_.units[task.unit];
      const int64_t products = (u.panel_end - u.panel_begin) * (u.block_end - u.block_begin) * taps_;
      work_.costs.push_back(work_.experts[u.expert].chunks * products * 64 / u.parts + 1);
    }
    for (const BiasTask& task : work_.bias_tasks)
      work_.costs.push_back(work_.experts[task.expert].chunks * 8 / task.parts + 1);
    if (op_.dweight) work_.costs.insert(work_.costs.end(), p_.num_experts, 1);
  }

  static LocalMemory& local() {
    static thread_local LocalMemory memory;
    return memory;
  }

  void multiply(const Task& task) const {
    const Unit& u = work_.units[task.unit];
    const Expert& e = work_.experts[u.expert];
    LocalMemory& memory = local();
    const int64_t floats = unit_floats(u);
    float* sums = u.parts > 1 ? parts_ + u.memory + task.part * floats : memory.sums.get<float>(floats);
    std::memset(sums, 0, floats * sizeof(float));
    const int64_t begin = e.chunks * task.part / u.parts, end = e.chunks * (task.part + 1) / u.parts;
    PixelLists lists;
    int64_t first = 0;  // chunk number of the group's first chunk
    for (int32_t g : work_.groups[u.expert]) {
      const int64_t chunks = group_chunks(g);
      for (int64_t c = std::max(begin, first); c < std::min(end, first + chunks); ++c)
        multiply_chunk(u, chunk(g, c - first, chunks), sums, memory, lists);
      first += chunks;
    }
    if (u.parts > 1) {
      if (counters_[u.counter].fetch_add(1, std::memory_order_acq_rel) + 1 < u.parts) return;
      sums = parts_ + u.memory;
      for (int64_t part = 1; part < u.parts; ++part) kernels_.add(sums + part * floats, sums, floats);
    }
    unpack(u, sums);
  }

  // Chunks of the same rows follow each other, so that they can share a list of pixel pairs.
  Chunk chunk(int64_t g, int64_t index, int64_t chunks) const {
    const int64_t first = p_.offsets[g], samples = p_.offsets[g + 1] - first;
    const int64_t pieces = chunks / bands_, piece = index % pieces, band = index / pieces;
    return {g, first + samples * piece / pieces, first + samples * (piece + 1) / pieces, out_h_ * band / bands_,
            out_h_ * (band + 1) / bands_};
  }

  // For every tap the output pixels of a chunk whose input pixel is inside the image; the others multiply padding.
  struct PixelLists {
    int64_t samples = -1, row_begin = -1, row_end = -1;
    int64_t input_begin = 0, input_end = 0;  // input rows that are read
    PixelPair* pairs = nullptr;              // tap t: [t * capacity, t * capacity + counts[t])
    int64_t* counts = nullptr;
    int64_t capacity = 0;
  };

  void list_pixels(const Chunk& chunk, LocalMemory& memory, PixelLists& lists) const {
    const int64_t samples = chunk.sample_end - chunk.sample_begin, rows = chunk.row_end - chunk.row_begin;
    if (lists.samples == samples && lists.row_begin == chunk.row_begin && lists.row_end == chunk.row_end) return;
    lists.samples = samples, lists.row_begin = chunk.row_begin, lists.row_end = chunk.row_end;
    lists.input_begin = std::max<int64_t>(0, chunk.row_begin * p_.stride_height - p_.pad_height);
    lists.input_end = std::max(lists.input_begin, std::min(p_.height, (chunk.row_end - 1) * p_.stride_height -
                                                                          p_.pad_height + p_.filter_height));
    lists.capacity = samples * rows * out_w_;
    char* storage =
        static_cast<char*>(memory.pairs.reserve(taps_ * (sizeof(int64_t) + lists.capacity * sizeof(PixelPair))));
    lists.counts = reinterpret_cast<int64_t*>(storage);
    lists.pairs = reinterpret_cast<PixelPair*>(storage + taps_ * sizeof(int64_t));
    const int64_t input_image = (lists.input_end - lists.input_begin) * p_.width;
    for (int64_t t = 0; t < taps_; ++t) {
      const int64_t r = t / p_.filter_width - p_.pad_height, s = t % p_.filter_width - p_.pad_width;
      // Output columns whose input column is inside.
      const int64_t j_begin = s < 0 ? ceil_div(-s, p_.stride_width) : 0;
      const int64_t j_end = s >= p_.width ? 0 : std::min(out_w_, (p_.width - 1 - s) / p_.stride_width + 1);
      PixelPair* pair = lists.pairs + t * lists.capacity;
      for (int64_t n = 0; n < samples; ++n) {
        for (int64_t i = chunk.row_begin; i < chunk.row_end; ++i) {
          const int64_t y = i * p_.stride_height + r;
          if (y < 0 || y >= p_.height) continue;
          const int64_t x = n * input_image + (y - lists.input_begin) * p_.width + s;
          const int64_t dy = (n * rows + i - chunk.row_begin) * out_w_;
          for (int64_t j = j_begin; j < j_end; ++j)
            *pair++ = {static_cast<int32_t>((x + j * p_.stride_width) * kDepthBlock),
                       static_cast<int32_t>((dy + j) * panel_)};
        }
      }
      lists.counts[t] = pair - (lists.pairs + t * lists.capacity);
    }
  }

  void multiply_chunk(const Unit& u, const Chunk& chunk, float* sums, LocalMemory& memory, PixelLists& lists) const {
    const Expert& e = work_.experts[u.expert];
    const int64_t live_panels = std::min(u.panel_end, ceil_div(p_.live_out(chunk.group), panel_));
    if (live_panels <= u.panel_begin) return;
    list_pixels(chunk, memory, lists);
    const float* dy = copy_dy(u, chunk, live_panels, memory);
    const int64_t dy_panel =
        (chunk.sample_end - chunk.sample_begin) * (chunk.row_end - chunk.row_begin) * out_w_ * panel_;
    for (int64_t block = u.block_begin; block < u.block_end; ++block) {
      const int64_t live = std::min(kDepthBlock, p_.live_in(chunk.group) - block * kDepthBlock);
      if (live <= 0) break;
      const float* source = copy_source(chunk, block, live, memory, lists);
      const int64_t depth = block_depth(e, block), tiles = ceil_div(live, kernels_.pixels);
      for (int64_t panel = u.panel_begin; panel < live_panels; ++panel) {
        OuterTile tile;
        tile.vectors = static_cast<int>(ceil_div(live_lanes(chunk, panel), kernels_.lanes));
        tile.dy = dy + (panel - u.panel_begin) * dy_panel;
        tile.row = panel_row(e, panel);
        float* to = sums + panel_sums(u, panel) + block_rows(block - u.block_begin) * tile.row;
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

  // The chunk's dy, panel by panel, pixels of panel_ floats: whole vectors of live lanes, zero past the live width.
  const float* copy_dy(const Unit& u, const Chunk& chunk, int64_t live_panels, LocalMemory& memory) const {
    const int64_t pixels = (chunk.row_end - chunk.row_begin) * out_w_;
    float* to =
        memory.dy.get<float>((live_panels - u.panel_begin) * (chunk.sample_end - chunk.sample_begin) * pixels * panel_);
    const float* const first = to;
    for (int64_t panel = u.panel_begin; panel < live_panels; ++panel) {
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

  // A block of live channels of the input rows that the chunk reads.
  const float* copy_source(const Chunk& chunk, int64_t block, int64_t live, LocalMemory& memory,
                           const PixelLists& lists) const {
    const int64_t pixels = (lists.input_end - lists.input_begin) * p_.width;
    const int64_t samples = chunk.sample_end - chunk.sample_begin;
    float* to = memory.source.get<float>(samples * pixels * kDepthBlock + 1);
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t pixel = ((chunk.sample_begin + n) * p_.height + lists.input_begin) * p_.width;
      kernels_.copy[type_](static_cast<const char*>(op_.x) + (pixel * p_.in_channels + block * kDepthBlock) * element_,
                           p_.in_channels, to + n * pixels * kDepthBlock, kDepthBlock, pixels, live, live);
    }
    return to;
  }

  void unpack(const Unit& u, const float* sums) const {
    const Expert& e = work_.experts[u.expert];
    PanelUnpack out;
    out.taps = work_.taps.data();
    out.num_taps = taps_;
    out.taps_dense = true;
    for (int64_t t = 0; t < taps_; ++t) out.taps_dense = out.taps_dense && work_.taps[t] == t;
    out.lane_stride = p_.weight_strides[1];
    out.depth_stride = p_.weight_strides[2];
    for (int64_t panel = u.panel_begin; panel < u.panel_end; ++panel) {
      out.row = panel_row(e, panel);
      out.lanes = std::min<int64_t>(panel_, e.lanes - panel * panel_);
      for (int64_t block = u.block_begin; block < u.block_end; ++block) {
        out.sums = sums + panel_sums(u, panel) + block_rows(block - u.block_begin) * out.row;
        out.depth = block_depth(e, block);
        const int64_t first =
            u.expert * p_.weight_strides[0] + panel * panel_ * out.lane_stride + block * kDepthBlock * out.depth_stride;
        out.weights = static_cast<char*>(op_.dweight) + first * element_;
        kernels_.unpack[type_](out);
      }
    }
  }

  // Exact zeros where an expert has no live channel.
  void zero_dead(int64_t expert) const {
    const Expert& e = work_.experts[expert];
    if (e.lanes == p_.out_channels && e.depth == p_.in_channels) return;
    char* base = static_cast<char*>(op_.dweight) + expert * p_.weight_strides[0] * element_;
    const int64_t* stride = p_.weight_strides;
    for (int64_t k = 0; k < p_.out_channels; ++k) {
      const int64_t first = k < e.lanes ? e.depth : 0, dead = p_.in_channels - first;
      char* row = base + (k * stride[1] + first * stride[2]) * element_;
      bool taps_dense = stride[2] == taps_;
      for (int64_t t = 0; t < taps_ && taps_dense; ++t) taps_dense = work_.taps[t] == t;
      if (taps_dense) {
        std::memset(row, 0, dead * taps_ * element_);
        continue;
      }
      for (int64_t t = 0; t < taps_; ++t) {
        char* tap = row + work_.taps[t] * element_;
        if (stride[2] == 1)
          std::memset(tap, 0, dead * element_);
        else
          for (int64_t c = 0; c < dead; ++c) std::memset(tap + c * stride[2] * element_, 0, element_);
      }
    }
  }

  void sum_bias(const BiasTask& task) const {
    const Expert& e = work_.experts[task.expert];
    const int64_t channels = p_.out_channels;
    float* part = bias_parts_ + (task.expert * kBiasParts + task.part) * channels;
    std::memset(part, 0, channels * sizeof(float));
    float* sums = local().bias.get<float>(channels);
    const int64_t begin = e.samples * task.part / task.parts, end = e.samples * (task.part + 1) / task.parts;
    int64_t first = 0;
    for (int32_t g : work_.groups[task.expert]) {
      const int64_t samples = p_.offsets[g + 1] - p_.offsets[g], live = p_.live_out(g);
      for (int64_t i = std::max(begin, first); i < std::min(end, first + samples); ++i) {
        const int64_t n = p_.offsets[g] + i - first;
        kernels_.sum_rows[type_](static_cast<const char*>(op_.dy) + n * image_ * channels * element_, channels, image_,
                                 live, sums);
        if (op_.dsample_bias) {
          char* out = static_cast<char*>(op_.dsample_bias) + n * channels * element_;
          kernels_.narrow[type_](sums, out, live);
          std::memset(out + live * element_, 0, (channels - live) * element_);
        }
        kernels_.add(sums, part, live);
      }
      first += samples;
    }
    if (!op_.dbias) return;
    if (counters_[first_bias_counter_ + task.expert].fetch_add(1, std::memory_order_acq_rel) + 1 < task.parts) return;
    part = bias_parts_ + task.expert * kBiasParts * channels;
    for (int64_t i = 1; i < task.parts; ++i) kernels_.add(part + i * channels, part, channels);
    kernels_.narrow[type_](part, static_cast<char*>(op_.dbias) + task.expert * channels * element_, channels);
  }

  const Conv2dProblem& p_;
  const Operands op_;
  Workspace& work_;
  const ConvKernels& kernels_;
  int panel_, type_;
  int64_t element_, out_h_, out_w_, taps_, image_;
  int64_t bands_ = 1, chunk_samples_ = 1, macs_ = 0, first_bias_counter_ = 0;
  float *parts_ = nullptr, *bias_parts_ = nullptr;
  std::atomic<int64_t>* counters_ = nullptr;
};

Workspace& workspace() {
  static thread_local Workspace work;
  return work;
}

}  // namespace

void conv2d_wgrad(const Conv2dProblem& problem, const void* x, const void* dy, void* dweight, void* dbias,
                  void* dsample_bias) {
  problem.check();
  Wgrad(problem, {x, dy, dweight, dbias, dsample_bias}, workspace()).run();
}

}  // namespace tdc
