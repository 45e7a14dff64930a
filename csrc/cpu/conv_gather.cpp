// The host side of forward and dgrad: computes chunks of pixels of all groups in one parallel region, which packs the
// live weights of an expert into panels when the first chunk needs them.
#include "cpu/conv_geometry.h"

#include <algorithm>
#include <cstring>

#include "cpu/conv_kernels.h"
#include "cpu/conv_panels.h"
#include "cpu/conv_scratch.h"
#include "cpu/conv_shares.h"

namespace tdc {
namespace {

constexpr int64_t kSourceLimit = int64_t{192} << 10;  // bytes of source per task: it shares L2 with a panel
constexpr int64_t kWeightLimit = int64_t{640} << 10;  // bytes of packed weights that chunk after chunk finds in L2
constexpr int64_t kChunkPixels = 128;
constexpr int64_t kLeastPixels = 64;                 // fewer would leave tiles of image corners too small
constexpr int64_t kTasksWanted = 32;                 // enough for an even load, from shapes alone
constexpr int64_t kParallelMacs = int64_t{1} << 19;  // below, waking a thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Task {
  int64_t group, sample_begin, sample_end, row_begin, row_end, panel_begin, panel_end;
};

struct Workspace {  // of the calling thread, read by all
  GatherGeometry geometry;
  PackedPanels panels;
  std::vector<Task> tasks;
  std::vector<int64_t> costs;  // of the tasks
  WorkShares shares;
};

struct LocalMemory {  // of each thread
  Scratch source, pixels, classes, taps, init;
};

struct Operands {
  const void *source, *source2, *weight, *bias, *sample_bias, *residual;
  void* dest;
};

class Gather {
 public:
  Gather(const Conv2dProblem& problem, bool dgrad, const Operands& operands, Workspace& work)
      : p_(problem), dgrad_(dgrad), op_(operands), work_(work), geo_(work.geometry), panels_(work.panels),
        kernels_(TDC_ISA_CALL(conv_kernels)) {
    type_ = static_cast<int>(p_.dtype);
    element_ = p_.dtype == DType::kFloat32 ? 4 : 2;
    geo_.set(p_, dgrad);
    panels_.reset(p_, geo_, kernels_, operands.weight);
    panel_ = panels_.lanes_per_panel();
  }

  void run() {
    if (p_.batch == 0) return;
    plan_experts();
    plan_chunks();
    const int threads = macs_ < kParallelMacs ? 1 : p_.threads;
    while (panels_.next_wave(threads)) {
      work_.tasks.clear();
      work_.costs.clear();
      for (int64_t g = 0; g < p_.num_groups; ++g)
        if (p_.expert(g) >= panels_.first_expert() && p_.expert(g) <= panels_.last_expert()) plan_group(g);
      work_.shares.run(work_.costs, threads, [&](int64_t task, int thread) { compute(task, thread); });
    }
  }

 private:
  int64_t live_source(int64_t g) const { return dgrad_ ? p_.live_out(g) : p_.live_in(g); }
  int64_t live_dest(int64_t g) const { return dgrad_ ? p_.live_in(g) : p_.live_out(g); }
  int64_t num_taps() const { return geo_.num_taps(); }
  // Whether a task copies its source to fp32: in bf16, and to bring two inputs together.
  bool copies_source() const { return type_ != 0 || op_.source2; }

  void plan_experts() {
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      const int64_t samples = p_.offsets[g + 1] - p_.offsets[g];
      if (samples == 0) continue;
      panels_.widen(p_.expert(g), live_dest(g), live_source(g));
      depth_ = std::max(depth_, live_source(g)), lanes_ = std::max(lanes_, live_dest(g));
      macs_ += samples * geo_.rows.indices * geo_.columns.indices * num_taps() * live_source(g) * live_dest(g);
    }
  }

  // Chunks of whole small images or of rows of a large one, sized by shapes alone.
  void plan_chunks() {
    const int64_t rows = geo_.rows.indices, image = rows * geo_.columns.indices;
    const int64_t pixels = p_.batch * image;
    const int64_t wanted = std::min(kChunkPixels, std::max<int64_t>(kLeastPixels, pixels / kTasksWanted));
    const int64_t line = geo_.columns.source_size * depth_ * 4;  // bytes of a source row in fp32
    chunk_samples_ = 1;
    chunk_rows_ = rows;
    if (image >= wanted) {
      int64_t most_rows = std::max<int64_t>(1, wanted / geo_.columns.indices);
      const int64_t extra = geo_.rows.max_tap - geo_.rows.min_tap;
      while (most_rows > 1 && ((most_rows - 1) * geo_.rows.source_step + extra + 1) * line > kSourceLimit) --most_rows;
      chunk_rows_ = ceil_div(rows, ceil_div(rows, most_rows));
    } else {
      const int64_t samples = std::min(wanted / image, kSourceLimit / (geo_.rows.source_size * line));
      chunk_samples_ = std::max<int64_t>(1, samples);
      if (op_.sample_bias) chunk_samples_ = std::max<int64_t>(1, std::min(chunk_samples_, (int64_t{1} << 15) / lanes_));
    }
    // With few chunks, the panels are divided among tasks as well.
    int64_t chunks = 0;
    for (int64_t g = 0; g < p_.num_groups; ++g)
      chunks += ceil_div(p_.offsets[g + 1] - p_.offsets[g], chunk_samples_) * ceil_div(rows, chunk_rows_);
    panel_ranges_ = ceil_div(kTasksWanted, std::max<int64_t>(chunks, 1));
  }

  void plan_group(int64_t g) {
    const PackedPanels::Expert& e = panels_.expert(p_.expert(g));
    const int64_t total = panels_.count(live_dest(g));
    const int64_t begin = std::min(e.begin, total), end = std::min(e.end, total);
    if (begin == end && !(total == 0 && e.begin == 0)) return;
    const int64_t weights = num_taps() * panels_.tap_rows(e) * panel_ * 4 * (end - begin);
    const int64_t wanted = std::max(panel_ranges_, ceil_div(weights, kWeightLimit));
    const int64_t ranges = std::max<int64_t>(1, std::min(wanted, end - begin));
    const int64_t first = p_.offsets[g], samples = p_.offsets[g + 1] - first;
    const int64_t sample_ranges = ceil_div(samples, chunk_samples_),
                  row_ranges = ceil_div(geo_.rows.indices, chunk_rows_);
    // All chunks with one range of panels, then all with the next.
    for (int64_t s = 0; s < ranges; ++s)
      for (int64_t i = 0; i < sample_ranges; ++i)
        for (int64_t b = 0; b < row_ranges; ++b)
          add_task({g, first + samples * i / sample_ranges, first + samples * (i + 1) / sample_ranges,
                    geo_.rows.indices * b / row_ranges, geo_.rows.indices * (b + 1) / row_ranges,
                    begin + (end - begin) * s / ranges, begin + (end - begin) * (s + 1) / ranges});
  }

  void add_task(const Task& task) {
    work_.tasks.push_back(task);
    panels_.expect(p_.expert(task.group), task.panel_begin, task.panel_end);
    const int64_t rows = (task.sample_end - task.sample_begin) * (task.row_end - task.row_begin);
    work_.costs.push_back(rows * (live_source(task.group) + 4) * (task.panel_end - task.panel_begin + 1));
  }

  static LocalMemory& local() {
    static thread_local LocalMemory memory;
    return memory;
  }

  // Pixels of a task that share a list of taps.
  struct Class {
    int64_t pixel_begin, pixel_end, tap_begin, tap_end;
    bool narrow;
  };

  // Whether the pixels of a class in one sample fill half a tile at most. From the image's shape alone, because it
  // decides the order of a pixel's sums: as if the rows were cut into the smallest tasks.
  bool is_narrow(const AxisRun& i_run, const AxisRun& j_run) const {
    const int64_t rows = std::max<int64_t>(1, kLeastPixels / geo_.columns.indices);
    return std::min(rows, i_run.end - i_run.begin) * (j_run.end - j_run.begin) * 2 <= kernels_.pixels;
  }

  // Where the source pixels of a task are.
  struct SourceView {
    const float* base;           // pixel (0, 0) of the first sample, which may lie outside the buffer
    int64_t pixel, line, image;  // floats from pixel to pixel, row to row, sample to sample
  };

  void compute(int64_t index, int thread) const {
    const Task& task = work_.tasks[index];
    if (task.panel_begin == task.panel_end) return zero_rows(task);
    panels_.prepare(p_.expert(task.group), task.panel_begin, task.panel_end, thread);
    LocalMemory& memory = local();
    const SourceView source = copies_source() ? copy_source(task, memory) : view_source(task);
    int64_t init_stride = 0;
    const float* init = initial_rows(task, memory, init_stride);

    const int64_t samples = task.sample_end - task.sample_begin, rows = task.row_end - task.row_begin;
    ConvPixel* pixels = memory.pixels.get<ConvPixel>(samples * rows * geo_.rows.dest_step * geo_.columns.dest_size);
    Counts counts = count_classes(task);
    Class* classes = memory.classes.get<Class>(counts.classes + 1);
    GatherTap* taps = memory.taps.get<GatherTap>(counts.taps + 1);
    counts = {};
    int64_t pixel_count = 0;
    each_class(task, [&](size_t phase, const AxisPhase& row, const AxisRun& i_run, int64_t i_begin, int64_t i_end,
                         const AxisPhase& column, const AxisRun& j_run) {
      Class& c = classes[counts.classes++];
      c.pixel_begin = pixel_count;
      c.narrow = is_narrow(i_run, j_run);
      for (int64_t n = 0; n < samples; ++n) {
        for (int64_t i = i_begin; i < i_end; ++i) {
          const float* from = source.base + n * source.image + i * geo_.rows.source_step * source.line +
                              j_run.begin * geo_.columns.source_step * source.pixel;
          const int64_t line = (task.sample_begin + n) * geo_.rows.dest_size + i * geo_.rows.dest_step + row.phase;
          int64_t to = (line * geo_.columns.dest_size + j_run.begin * geo_.columns.dest_step + column.phase) *
                       geo_.dest_channels * element_;
          for (int64_t j = j_run.begin; j < j_run.end; ++j) {
            ConvPixel& pixel = pixels[pixel_count++];
            pixel.source = from;
            pixel.init = init + n * init_stride;
            pixel.residual = op_.residual ? static_cast<const char*>(op_.residual) + to : nullptr;
            pixel.out = static_cast<char*>(op_.dest) + to;
            from += geo_.columns.source_step * source.pixel;
            to += geo_.columns.dest_step * geo_.dest_channels * element_;
          }
        }
      }
      c.pixel_end = pixel_count;
      c.tap_begin = counts.taps;
      const int64_t tap_size = panels_.tap_rows(panels_.expert(p_.expert(task.group)));
      for (int r = i_run.tap_begin; r < i_run.tap_end; ++r)
        for (int s = j_run.tap_begin; s < j_run.tap_end; ++s)
          taps[counts.taps++] = {row.taps[r] * source.line + column.taps[s] * source.pixel,
                                 (geo_.first_tap[phase] + r * static_cast<int64_t>(column.taps.size()) + s) * tap_size};
      c.tap_end = counts.taps;
    });
    // Usually this thread continues with the next task.
    Prefetch next(*this, index + 1, task.panel_end - task.panel_begin, pixel_count);
    run_tiles(task, classes, counts.classes, pixels, taps, next);
    panels_.release(p_.expert(task.group), task.panel_begin, task.panel_end, thread);
  }

  // Fetches the source of the next task into the cache, a little after every tile.
  class Prefetch {
   public:
    Prefetch(const Gather& gather, int64_t index, int64_t panels, int64_t pixels) {
      if (gather.copies_source() || index >= static_cast<int64_t>(gather.work_.tasks.size())) return;
      const Task& task = gather.work_.tasks[index];
      const Axis& rows = gather.geo_.rows;
      const int64_t line = gather.geo_.columns.source_size;
      const int64_t begin = std::max<int64_t>(0, task.row_begin * rows.source_step + rows.min_tap);
      const int64_t end = std::min(rows.source_size, (task.row_end - 1) * rows.source_step + rows.max_tap + 1);
      const int64_t last = (task.sample_end - 1) * rows.source_size + end;
      stride_ = gather.geo_.source_channels;
      live_ = gather.live_source(task.group);
      at_ = static_cast<const float*>(gather.op_.source) +
            (task.sample_begin * rows.source_size + begin) * line * stride_;
      left_ = live_ == 0 ? 0 : std::max<int64_t>(0, (last - task.sample_begin * rows.source_size - begin) * line);
      per_pixel_ = ceil_div(left_ * 64, std::max<int64_t>(1, panels * pixels));
    }

    void advance(int64_t pixels) {
      credit_ += pixels * per_pixel_;
      for (; left_ > 0 && credit_ >= 64; credit_ -= 64, --left_, at_ += stride_)
        for (int64_t c = 0; c < live_; c += 16) __builtin_prefetch(at_ + c, 0, 2);
    }

   private:
    const float* at_ = nullptr;
    int64_t stride_ = 0, live_ = 0, left_ = 0, per_pixel_ = 0, credit_ = 0;  // credit: 64ths of a pixel
  };

  struct Counts {
    int64_t classes = 0, taps = 0;
  };

  Counts count_classes(const Task& task) const {
    Counts counts;
    each_class(task, [&](size_t, const AxisPhase&, const AxisRun& i_run, int64_t, int64_t, const AxisPhase&,
                         const AxisRun& j_run) {
      ++counts.classes;
      counts.taps += (i_run.tap_end - i_run.tap_begin) * (j_run.tap_end - j_run.tap_begin);
    });
    return counts;
  }

  template <typename Fn>
  void each_class(const Task& task, Fn&& fn) const {
    size_t phase = 0;
    for (const AxisPhase& row : geo_.rows.phases) {
      for (const AxisPhase& column : geo_.columns.phases) {
        for (const AxisRun& i_run : row.runs) {
          const int64_t begin = std::max(i_run.begin, task.row_begin), end = std::min(i_run.end, task.row_end);
          if (begin >= end) continue;
          for (const AxisRun& j_run : column.runs) fn(phase, row, i_run, begin, end, column, j_run);
        }
        ++phase;
      }
    }
  }

  void run_tiles(const Task& task, const Class* classes, int64_t num_classes, const ConvPixel* pixels,
                 const GatherTap* taps, Prefetch& next) const {
    const PackedPanels::Expert& e = panels_.expert(p_.expert(task.group));
    GatherTile tile;
    tile.depth = live_source(task.group);
    tile.live = live_dest(task.group);
    tile.channels = geo_.dest_channels;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      tile.channel = panel * panel_;
      tile.row = panels_.row(e, panel);
      tile.weights = panels_.weights(e, panel);
      const int64_t vectors = ceil_div(tile.live - tile.channel, kernels_.lanes);
      tile.vectors = static_cast<int>(std::min<int64_t>(kPanelVectors, vectors));
      tile.last = tile.channel + panel_ >= tile.live;
      for (const Class* c = classes; c != classes + num_classes; ++c) {
        tile.taps = taps + c->tap_begin;
        tile.num_taps = tile.depth == 0 ? 0 : c->tap_end - c->tap_begin;
        tile.narrow = c->narrow;
        // Tiles of about equal size: a last tile of one pixel would have too few independent sums.
        const int64_t count = c->pixel_end - c->pixel_begin;
        const int64_t tiles = ceil_div(count, c->narrow ? kernels_.pixels / 2 : kernels_.pixels);
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t begin = count * i / tiles;
          tile.pixels = pixels + c->pixel_begin + begin;
          tile.num_pixels = static_cast<int>(count * (i + 1) / tiles - begin);
          kernels_.gather[type_](tile);
          next.advance(tile.num_pixels);
        }
      }
    }
  }

  SourceView view_source(const Task& task) const {
    SourceView view = {nullptr, geo_.source_channels, 0, 0};
    view.line = view.pixel * geo_.columns.source_size;
    view.image = view.line * geo_.rows.source_size;
    view.base = static_cast<const float*>(op_.source) + task.sample_begin * view.image;
    return view;
  }

  // The live channels of the source rows that the task reads, of both inputs, in fp32.
  SourceView copy_source(const Task& task, LocalMemory& memory) const {
    const Axis& rows = geo_.rows;
    const int64_t depth = live_source(task.group), columns = geo_.columns.source_size;
    const int64_t begin = std::max<int64_t>(0, task.row_begin * rows.source_step + rows.min_tap);
    const int64_t end =
        std::max(begin, std::min(rows.source_size, (task.row_end - 1) * rows.source_step + rows.max_tap + 1));
    SourceView view = {nullptr, depth, depth * columns, depth * columns * (end - begin)};
    float* buffer = memory.source.get<float>((task.sample_end - task.sample_begin) * view.image + 1);
    const auto copy = [&](const void* source, int64_t channels, int64_t live, float* to) {
      for (int64_t n = task.sample_begin; n < task.sample_end; ++n, to += view.image)
        kernels_.copy[type_](
            static_cast<const char*>(source) + (n * rows.source_size + begin) * columns * channels * element_, channels,
            to, depth, (end - begin) * columns, live, live);
    };
    const int64_t second = op_.source2 ? p_.x2_channels : 0, first = geo_.source_channels - second;
    copy(op_.source, first, std::min(first, depth), buffer);
    if (depth > first) copy(op_.source2, second, depth - first, buffer + first);
    view.base = buffer - begin * view.line;
    return view;
  }

  // bias (+ sample_bias) of the task's panels in fp32, zero past the live width: one row, or one per sample.
  const float* initial_rows(const Task& task, LocalMemory& memory, int64_t& stride) const {
    const int64_t begin = task.panel_begin * panel_, width = (task.panel_end - task.panel_begin) * panel_;
    const int64_t live = std::min(width, live_dest(task.group) - begin);
    const int64_t rows = op_.sample_bias ? task.sample_end - task.sample_begin : 1;
    float* init = memory.init.get<float>((rows + 1) * width);
    stride = op_.sample_bias ? width : 0;
    float* bias = init + rows * width;
    if (!op_.sample_bias) bias = init;
    if (op_.bias)
      kernels_.copy[type_](
          static_cast<const char*>(op_.bias) + (p_.expert(task.group) * geo_.dest_channels + begin) * element_, 0, bias,
          0, 1, live, width);
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

  void zero_rows(const Task& task) const {
    const int64_t line = geo_.columns.dest_size * geo_.dest_channels * element_;
    const int64_t begin = task.row_begin * geo_.rows.dest_step;
    const int64_t end = std::min(task.row_end * geo_.rows.dest_step, geo_.rows.dest_size);
    for (int64_t n = task.sample_begin; n < task.sample_end; ++n)
      std::memset(static_cast<char*>(op_.dest) + (n * geo_.rows.dest_size + begin) * line, 0, (end - begin) * line);
  }

  const Conv2dProblem& p_;
  const bool dgrad_;
  const Operands op_;
  Workspace& work_;
  GatherGeometry& geo_;
  PackedPanels& panels_;
  const ConvKernels& kernels_;
  int type_;
  int64_t panel_, element_, macs_ = 0;
  int64_t depth_ = 1, lanes_ = 1;  // the widest group's
  int64_t chunk_rows_ = 0, chunk_samples_ = 0, panel_ranges_ = 1;
};

Workspace& workspace() {
  static thread_local Workspace work;
  return work;
}

}  // namespace

void conv2d_forward(const Conv2dProblem& problem, const Conv2dInput& input, const void* weight, const void* bias,
                    const void* sample_bias, const void* residual, void* y) {
  problem.check();
  const void* x2 = problem.x2_channels ? input.x2 : nullptr;
  Gather(problem, false, {input.x, x2, weight, bias, sample_bias, residual, y}, workspace()).run();
}

void conv2d_dgrad(const Conv2dProblem& problem, const void* dy, const void* weight, void* dx, void* dx2) {
  problem.check();
  const auto run = [&](const Conv2dProblem& part, int64_t first, void* dest) {
    const int64_t skipped = first * problem.weight_strides[2] * (problem.dtype == DType::kFloat32 ? 4 : 2);
    const void* from = static_cast<const char*>(weight) + skipped;
    Gather(part, true, {dy, nullptr, from, nullptr, nullptr, nullptr, dest}, workspace()).run();
  };
  if (!problem.x2_channels) return run(problem, 0, dx);
  // The channels of each input as a problem of their own.
  std::vector<int32_t> widths(problem.num_groups);
  const auto run_part = [&](int64_t first, int64_t channels, void* dest) {
    Conv2dProblem part = problem;
    part.in_channels = channels, part.x2_channels = 0, part.in_widths = widths.data();
    for (int64_t g = 0; g < problem.num_groups; ++g)
      widths[g] = static_cast<int32_t>(std::clamp<int64_t>(problem.live_in(g) - first, 0, channels));
    run(part, first, dest);
  };
  run_part(0, problem.x_channels(), dx);
  run_part(problem.x_channels(), problem.x2_channels, dx2);
}

}  // namespace tdc
