// The host side of forward and dgrad: packs the live weights of every expert into panels, then computes blocks of
// pixels of all groups, in one parallel region.
#include "cpu/conv_gather.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

#include "common/parallel.h"
#include "cpu/conv_kernels.h"
#include "cpu/conv_scratch.h"

namespace tdc {
namespace {

constexpr int64_t kPackedLimit = int64_t{6} << 20;    // bytes of packed weights at a time
constexpr int64_t kSourceLimit = int64_t{192} << 10;  // bytes of padded source per task: it shares L2 with a panel
constexpr int64_t kBlockPixels = 128;
constexpr int64_t kTasksWanted = 64;                  // enough for an even load, from shapes alone
constexpr int64_t kParallelMacs = int64_t{1} << 19;   // below, waking a thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Panels {          // an expert's packed weights in this wave: panels [begin, end)
  int64_t lanes = 0, depth = 0;  // the widest of the groups that use it
  int64_t begin = 0, end = 0;
  int64_t memory = 0;    // first float
  int64_t flag = 0;      // ready[flag + panel - begin]
};

struct PackTask {
  int64_t expert, panel;
};

struct BlockTask {
  int64_t group, sample_begin, sample_end, row_begin, row_end, panel_begin, panel_end;
};

struct Workspace {       // of the calling thread, read by all
  GatherGeometry geometry;
  std::vector<Panels> experts;
  std::vector<PackTask> packs;
  std::vector<BlockTask> blocks;
  Scratch packed, ready;
};

struct LocalMemory {     // of each thread
  Scratch source, pixels, taps, init;
};

struct Operands {
  const void *source, *weight, *bias, *sample_bias, *residual;
  void* dest;
};

class Gather {
 public:
  Gather(const Conv2dProblem& problem, bool dgrad, const Operands& operands, Workspace& work)
      : p_(problem), dgrad_(dgrad), op_(operands), work_(work), geo_(work.geometry), kernels_(TDC_ISA_CALL(conv_kernels)) {
    panel_ = kernels_.lanes * kPanelVectors;
    type_ = static_cast<int>(p_.dtype);
    element_ = p_.dtype == DType::kFloat32 ? 4 : 2;
    if (dgrad)
      geo_.set_dgrad(p_);
    else
      geo_.set_forward(p_);
    // Source pixels can be read in place when no tap leaves the image.
    direct_ = type_ == 0 && geo_.min_row >= 0 && geo_.min_column >= 0 &&
              (geo_.rows - 1) * geo_.source_step_h + geo_.max_row < geo_.source_height &&
              (geo_.columns - 1) * geo_.source_step_w + geo_.max_column < geo_.source_width;
    band_width_ = (geo_.columns - 1) * geo_.source_step_w + geo_.max_column - geo_.min_column + 1;
    weight_end_ = 1;
    const int64_t sizes[5] = {p_.num_experts, p_.out_channels, p_.in_channels, p_.filter_height, p_.filter_width};
    for (int d = 0; d < 5; ++d) weight_end_ += (sizes[d] - 1) * p_.weight_strides[d];
  }

  void run() {
    if (p_.batch == 0) return;
    plan_experts();
    plan_blocks();
    int64_t expert = 0, panel = 0;
    do {
      next_wave(expert, panel);
      run_wave();
    } while (expert < p_.num_experts);
  }

 private:
  int64_t live_source(int64_t g) const { return dgrad_ ? p_.live_out(g) : p_.live_in(g); }
  int64_t live_dest(int64_t g) const { return dgrad_ ? p_.live_in(g) : p_.live_out(g); }
  int64_t num_taps() const { return static_cast<int64_t>(geo_.taps.size()); }
  int64_t panel_row(const Panels& e, int64_t panel) const {
    return std::min<int64_t>(panel_, ceil_div(e.lanes - panel * panel_, kernels_.lanes) * kernels_.lanes);
  }

  void plan_experts() {
    work_.experts.assign(p_.num_experts, {});
    macs_ = 0;
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      const int64_t samples = p_.offsets[g + 1] - p_.offsets[g];
      if (samples == 0) continue;
      Panels& e = work_.experts[p_.expert(g)];
      e.lanes = std::max(e.lanes, live_dest(g));
      e.depth = std::max(e.depth, live_source(g));
      macs_ += samples * geo_.rows * geo_.columns * num_taps() * live_source(g) * live_dest(g);
    }
  }

  // Blocks of whole small images or of rows of a large one, sized by shapes alone.
  void plan_blocks() {
    const int64_t image = geo_.rows * geo_.columns;
    const int64_t pixels = p_.batch * image;
    block_pixels_ = std::min(kBlockPixels, std::max<int64_t>(kernels_.pixels * 4, pixels / kTasksWanted));
    int64_t depth = 1, lanes = 1;
    for (const Panels& e : work_.experts) depth = std::max(depth, e.depth), lanes = std::max(lanes, e.lanes);
    const int64_t line = band_width_ * depth * 4;  // bytes of a source row in fp32
    if (image >= block_pixels_) {
      block_samples_ = 1;
      int64_t rows = std::max<int64_t>(1, block_pixels_ / geo_.columns);
      const int64_t extra = geo_.max_row - geo_.min_row;
      while (rows > 1 && ((rows - 1) * geo_.source_step_h + extra + 1) * line > kSourceLimit) --rows;
      block_rows_ = ceil_div(geo_.rows, ceil_div(geo_.rows, rows));
    } else {
      block_rows_ = geo_.rows;
      const int64_t band = ((geo_.rows - 1) * geo_.source_step_h + geo_.max_row - geo_.min_row + 1) * line;
      block_samples_ = std::max<int64_t>(1, block_pixels_ / image);
      block_samples_ = std::max<int64_t>(1, std::min(block_samples_, kSourceLimit / band));
      if (op_.sample_bias) block_samples_ = std::max<int64_t>(1, std::min(block_samples_, (int64_t{1} << 15) / lanes));
    }
    // Few blocks: spread the panels over tasks as well.
    int64_t blocks = 0;
    for (int64_t g = 0; g < p_.num_groups; ++g)
      blocks += ceil_div(p_.offsets[g + 1] - p_.offsets[g], block_samples_) * ceil_div(geo_.rows, block_rows_);
    panel_splits_ = blocks >= kTasksWanted / 2 ? 1 : ceil_div(kTasksWanted / 2, std::max<int64_t>(blocks, 1));
  }

  // Takes panels from (expert, panel) on until the packed weights fill their limit.
  void next_wave(int64_t& expert, int64_t& panel) {
    work_.packs.clear();
    work_.blocks.clear();
    int64_t floats = 0;
    first_expert_ = expert;
    last_expert_ = expert;
    for (bool full = false; expert < p_.num_experts && !full;) {
      Panels& e = work_.experts[expert];
      const int64_t total = ceil_div(e.lanes, panel_);
      e.begin = panel;
      e.memory = floats;
      e.flag = static_cast<int64_t>(work_.packs.size());
      while (panel < total) {
        const int64_t size = num_taps() * e.depth * panel_row(e, panel);
        if (floats > 0 && (floats + size) * 4 > kPackedLimit) {
          full = true;
          break;
        }
        floats += size;
        work_.packs.push_back({expert, panel++});
      }
      e.end = panel;
      last_expert_ = expert;
      if (!full) ++expert, panel = 0;
    }
    packed_ = work_.packed.get<float>(std::max<int64_t>(floats, 1));
    ready_ = work_.ready.get<std::atomic<uint32_t>>(work_.packs.size() + 1);
    for (size_t i = 0; i < work_.packs.size(); ++i) new (ready_ + i) std::atomic<uint32_t>(0);
    for (int64_t g = 0; g < p_.num_groups; ++g)
      if (p_.expert(g) >= first_expert_ && p_.expert(g) <= last_expert_) plan_group(g);
  }

  void plan_group(int64_t g) {
    const Panels& e = work_.experts[p_.expert(g)];
    const int64_t total = ceil_div(live_dest(g), panel_);
    const int64_t begin = std::min(e.begin, total), end = std::min(e.end, total);
    if (begin == end && !(total == 0 && e.begin == 0)) return;
    const int64_t splits = std::max<int64_t>(1, std::min(panel_splits_, end - begin));
    const int64_t first = p_.offsets[g], samples = p_.offsets[g + 1] - first;
    const int64_t pieces = ceil_div(samples, block_samples_), bands = ceil_div(geo_.rows, block_rows_);
    for (int64_t i = 0; i < pieces; ++i)
      for (int64_t b = 0; b < bands; ++b)
        for (int64_t s = 0; s < splits; ++s)
          work_.blocks.push_back({g, first + samples * i / pieces, first + samples * (i + 1) / pieces,
                                  geo_.rows * b / bands, geo_.rows * (b + 1) / bands,
                                  begin + (end - begin) * s / splits, begin + (end - begin) * (s + 1) / splits});
  }

  void run_wave() {
    const int64_t packs = static_cast<int64_t>(work_.packs.size());
    const int64_t tasks = packs + static_cast<int64_t>(work_.blocks.size());
    const int threads = macs_ < kParallelMacs ? 1 : p_.threads;
    // Tasks are handed out in order, so whoever waits for a panel knows that a thread is packing it.
    parallel_for(tasks, threads, [&](int64_t task, int) {
      if (task < packs)
        pack(task);
      else
        compute(work_.blocks[task - packs]);
    });
  }

  void pack(int64_t index) {
    const PackTask& task = work_.packs[index];
    const Panels& e = work_.experts[task.expert];
    PanelPack pack;
    const char* base = static_cast<const char*>(op_.weight);
    pack.weights = base + (task.expert * p_.weight_strides[0] + task.panel * panel_ * geo_.lane_stride) * element_;
    pack.end = base + weight_end_ * element_;
    pack.lanes = std::min<int64_t>(panel_, e.lanes - task.panel * panel_);
    pack.lane_stride = geo_.lane_stride;
    pack.depth_stride = geo_.depth_stride;
    pack.depth = e.depth;
    pack.taps = geo_.tap_weights.data();
    pack.tap_at = geo_.tap_at.empty() ? nullptr : geo_.tap_at.data();
    pack.num_taps = num_taps();
    pack.packed = packed_ + panel_memory(e, task.panel);
    pack.row = panel_row(e, task.panel);
    kernels_.pack[type_](pack);
    ready_[index].store(1, std::memory_order_release);
  }

  // All panels but the last have the same size.
  int64_t panel_memory(const Panels& e, int64_t panel) const {
    return e.memory + (panel - e.begin) * num_taps() * e.depth * panel_;
  }

  void wait(int64_t flag) const {
    for (int spins = 0; !ready_[flag].load(std::memory_order_acquire);)
      if (++spins > 256) std::this_thread::yield();
  }

  static LocalMemory& local() {
    static thread_local LocalMemory memory;
    return memory;
  }

  void compute(const BlockTask& task) const {
    if (task.panel_begin == task.panel_end) return zero_rows(task);
    LocalMemory& memory = local();
    const int64_t depth = live_source(task.group);
    const float* source = nullptr;  // at (first sample, first row, tap origin)
    int64_t pitch = 0, line = 0, image = 0;  // floats from pixel to pixel, row to row, sample to sample
    if (direct_) {
      pitch = geo_.source_channels;
      line = pitch * geo_.source_width;
      image = line * geo_.source_height;
      source = static_cast<const float*>(op_.source) + task.sample_begin * image +
               (task.row_begin * geo_.source_step_h + geo_.min_row) * line + geo_.min_column * pitch;
    } else {
      pitch = depth;
      line = pitch * band_width_;
      image = line * band_rows(task);
      source = copy_source(task, depth, memory);
    }
    ptrdiff_t* taps = memory.taps.get<ptrdiff_t>(geo_.taps.size() + 1);
    for (size_t t = 0; t < geo_.taps.size(); ++t)
      taps[t] = (geo_.taps[t].row - geo_.min_row) * line + (geo_.taps[t].column - geo_.min_column) * pitch;
    int64_t init_stride = 0;
    const float* init = initial_rows(task, memory, init_stride);

    const int64_t block = (task.sample_end - task.sample_begin) * (task.row_end - task.row_begin) * geo_.columns;
    ConvPixel* pixels = memory.pixels.get<ConvPixel>(block);
    for (const GatherPhase& phase : geo_.phases) {
      int64_t count = 0;
      for (int64_t n = task.sample_begin; n < task.sample_end; ++n) {
        const int64_t local_sample = n - task.sample_begin;
        for (int64_t i = task.row_begin; i < std::min(task.row_end, phase.rows); ++i) {
          const float* from = source + local_sample * image + (i - task.row_begin) * geo_.source_step_h * line;
          const int64_t row = n * geo_.dest_height + i * geo_.dest_step_h + phase.row;
          int64_t to = (row * geo_.dest_width + phase.column) * geo_.dest_channels * element_;
          for (int64_t j = 0; j < phase.columns; ++j) {
            ConvPixel& pixel = pixels[count++];
            pixel.source = from;
            pixel.init = init + local_sample * init_stride;
            pixel.residual = op_.residual ? static_cast<const char*>(op_.residual) + to : nullptr;
            pixel.out = static_cast<char*>(op_.dest) + to;
            from += geo_.source_step_w * pitch;
            to += geo_.dest_step_w * geo_.dest_channels * element_;
          }
        }
      }
      run_tiles(task, phase, pixels, count, taps + phase.tap_begin, depth);
    }
  }

  void run_tiles(const BlockTask& task, const GatherPhase& phase, const ConvPixel* pixels, int64_t count,
                 const ptrdiff_t* taps, int64_t depth) const {
    const Panels& e = work_.experts[p_.expert(task.group)];
    GatherTile tile;
    tile.taps = taps;
    tile.num_taps = depth == 0 ? 0 : phase.tap_end - phase.tap_begin;
    tile.depth = depth;
    tile.live = live_dest(task.group);
    tile.channels = geo_.dest_channels;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      wait(e.flag + panel - e.begin);
      tile.channel = panel * panel_;
      tile.row = panel_row(e, panel);
      tile.tap_jump = (e.depth - depth) * tile.row;
      tile.weights = packed_ + panel_memory(e, panel) + phase.tap_begin * e.depth * tile.row;
      tile.vectors = static_cast<int>(std::min<int64_t>(kPanelVectors, ceil_div(tile.live - tile.channel, kernels_.lanes)));
      tile.last = tile.channel + panel_ >= tile.live;
      for (int64_t i = 0; i < count; i += kernels_.pixels) {
        tile.pixels = pixels + i;
        tile.num_pixels = static_cast<int>(std::min<int64_t>(kernels_.pixels, count - i));
        kernels_.gather[type_](tile);
      }
    }
  }

  int64_t band_rows(const BlockTask& task) const {
    return (task.row_end - task.row_begin - 1) * geo_.source_step_h + geo_.max_row - geo_.min_row + 1;
  }

  // The live channels of the block's source pixels in fp32, with zeros where a tap leaves the image.
  const float* copy_source(const BlockTask& task, int64_t depth, LocalMemory& memory) const {
    const int64_t rows = band_rows(task), line = band_width_ * depth;
    float* buffer = memory.source.get<float>((task.sample_end - task.sample_begin) * rows * line + 1);
    float* to = buffer;
    const int64_t left = std::min(std::max<int64_t>(0, -geo_.min_column), band_width_);
    const int64_t first = std::max<int64_t>(0, geo_.min_column);
    const int64_t copied = std::max<int64_t>(0, std::min(band_width_ - left, geo_.source_width - first));
    const int64_t right = band_width_ - left - copied;
    for (int64_t n = task.sample_begin; n < task.sample_end; ++n) {
      for (int64_t r = 0; r < rows; ++r, to += line) {
        const int64_t row = task.row_begin * geo_.source_step_h + geo_.min_row + r;
        if (row < 0 || row >= geo_.source_height || copied == 0) {
          std::memset(to, 0, line * sizeof(float));
          continue;
        }
        const int64_t pixel = (n * geo_.source_height + row) * geo_.source_width + first;
        std::memset(to, 0, left * depth * sizeof(float));
        kernels_.copy[type_](static_cast<const char*>(op_.source) + pixel * geo_.source_channels * element_,
                             geo_.source_channels, to + left * depth, depth, copied, depth, depth);
        std::memset(to + (left + copied) * depth, 0, right * depth * sizeof(float));
      }
    }
    return buffer;
  }

  // bias (+ sample_bias) of the task's panels in fp32, zero past the live width: one row, or one per sample.
  const float* initial_rows(const BlockTask& task, LocalMemory& memory, int64_t& stride) const {
    const int64_t begin = task.panel_begin * panel_, width = (task.panel_end - task.panel_begin) * panel_;
    const int64_t live = std::min(width, live_dest(task.group) - begin);
    const int64_t rows = op_.sample_bias ? task.sample_end - task.sample_begin : 1;
    float* init = memory.init.get<float>((rows + 1) * width);
    stride = op_.sample_bias ? width : 0;
    float* bias = init + rows * width;
    if (!op_.sample_bias) bias = init;
    if (op_.bias)
      kernels_.copy[type_](static_cast<const char*>(op_.bias) +
                               (p_.expert(task.group) * geo_.dest_channels + begin) * element_,
                           0, bias, 0, 1, live, width);
    else
      std::memset(bias, 0, width * sizeof(float));
    if (op_.sample_bias) {
      kernels_.copy[type_](
          static_cast<const char*>(op_.sample_bias) + (task.sample_begin * geo_.dest_channels + begin) * element_,
          geo_.dest_channels, init, width, rows, live, width);
      if (op_.bias)
        for (int64_t r = 0; r < rows; ++r) kernels_.add(bias, init + r * width, live);
    }
    return init - begin;
  }

  void zero_rows(const BlockTask& task) const {
    const int64_t line = geo_.dest_width * geo_.dest_channels * element_;
    const int64_t begin = task.row_begin * geo_.dest_step_h;
    const int64_t end = std::min(task.row_end * geo_.dest_step_h, geo_.dest_height);
    for (int64_t n = task.sample_begin; n < task.sample_end; ++n)
      std::memset(static_cast<char*>(op_.dest) + (n * geo_.dest_height + begin) * line, 0, (end - begin) * line);
  }

  const Conv2dProblem& p_;
  const bool dgrad_;
  const Operands op_;
  Workspace& work_;
  GatherGeometry& geo_;
  const ConvKernels& kernels_;
  int panel_, type_;
  int64_t element_, band_width_, weight_end_, macs_ = 0;
  int64_t block_pixels_ = 0, block_rows_ = 0, block_samples_ = 0, panel_splits_ = 1;
  int64_t first_expert_ = 0, last_expert_ = 0;
  bool direct_;
  float* packed_ = nullptr;
  std::atomic<uint32_t>* ready_ = nullptr;
};

Workspace& workspace() {
  static thread_local Workspace work;
  return work;
}

}  // namespace

void conv2d_forward(const Conv2dProblem& problem, const void* x, const void* weight, const void* bias,
                    const void* sample_bias, const void* residual, void* y) {
  problem.check();
  Gather(problem, false, {x, weight, bias, sample_bias, residual, y}, workspace()).run();
}

void conv2d_dgrad(const Conv2dProblem& problem, const void* dy, const void* weight, void* dx) {
  problem.check();
  Gather(problem, true, {dy, weight, nullptr, nullptr, nullptr, dx}, workspace()).run();
}

}  // namespace tdc
