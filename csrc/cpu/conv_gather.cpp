// The host side of forward and dgrad: computes chunks of pixels of all groups in one parallel region, which packs the
// live weights of an expert into panels when the first chunk needs them.
#include "cpu/conv_gather_plan.h"

#include <algorithm>
#include <cstring>

#include "cpu/conv_kernels.h"
#include "cpu/conv_panels.h"
#include "cpu/conv_scratch.h"
#include "cpu/conv_shares.h"
#include "cpu/conv_source_prefetch.h"

namespace tdc {
namespace {

constexpr int64_t kFlatLimit = int64_t{24} << 10;  // bytes of a pair of panels: they stay in L1 from tile to tile

struct Workspace {  // of the calling thread, read by all
  GatherGeometry geometry;
  PackedPanels panels;
  GatherPlan plan;
  WorkShares shares;
};

struct LocalMemory {  // of each thread
  Scratch source, pixels, classes, taps, init, row_taps;
};

struct Operands {
  const void *source, *source2, *weight, *bias, *sample_bias, *residual;
  void* dest;
};

class Gather {
 public:
  Gather(const Conv2dProblem& problem, bool dgrad, const Operands& operands, Workspace& work)
      : p_(problem), dgrad_(dgrad), op_(operands), work_(work), geo_(work.geometry), panels_(work.panels),
        plan_(work.plan), kernels_(TDC_ISA_CALL(conv_kernels)) {
    type_ = static_cast<int>(p_.dtype);
    element_ = p_.dtype == DType::kFloat32 ? 4 : 2;
    geo_.set(p_, dgrad);
    panels_.reset(p_, geo_, kernels_, operands.weight);
    panel_ = panels_.lanes_per_panel();
    in_rows_ = kernels_.row[type_] && geo_.columns.fits_row_tiles();
    flat_ = kernels_.flat[type_] && geo_.rows.is_identity() && geo_.columns.is_identity() &&
            !is_narrow(geo_.rows.phases[0].runs[0], geo_.columns.phases[0].runs[0]);
  }

  void run() {
    if (p_.batch == 0) return;
    plan_.set(p_, geo_, panels_, dgrad_, op_.sample_bias != nullptr);
    while (panels_.next_wave(plan_.threads())) {
      plan_.set_tasks();
      work_.shares.run(plan_.costs(), plan_.threads(), [&](int64_t task, int thread) { compute(task, thread); });
    }
  }

 private:
  // Whether a task copies its source to fp32: in bf16, and to bring two inputs together.
  bool copies_source() const { return type_ != 0 || op_.source2; }

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
    const GatherTask& task = plan_.tasks()[index];
    if (task.panel_begin == task.panel_end) return zero_rows(task);
    panels_.prepare(p_.expert(task.group), task.panel_begin, task.panel_end, thread);
    LocalMemory& memory = local();
    const SourceView source = copies_source() ? copy_source(task, memory) : view_source(task);
    int64_t init_stride = 0;
    const float* init = initial_rows(task, memory, init_stride);

    const int64_t pixels = (task.sample_end - task.sample_begin) * (task.row_end - task.row_begin) *
                           geo_.rows.dest_step * geo_.columns.dest_size;
    GatherTask rest = task;
    if (flat_ && plan_.live_source(task.group) * 2 * panel_ * 4 <= kFlatLimit)
      rest.panel_begin = run_flat(task, source, init, init_stride);
    // Usually this thread continues with the next task.
    SourcePrefetch next;
    if (!copies_source() && index + 1 < static_cast<int64_t>(plan_.tasks().size()))
      next.set(plan_, geo_, op_.source, index + 1, (rest.panel_end - rest.panel_begin) * pixels);
    if (in_rows_)
      run_rows(task, source, init, init_stride, memory.row_taps, next);
    else if (rest.panel_begin < rest.panel_end)
      run_lists(rest, source, init, init_stride, pixels, memory, next);
    panels_.release(p_.expert(task.group), task.panel_begin, task.panel_end, thread);
  }

  // All tiles of a task in gather tiles: lists its pixels, by class, and the taps of each class.
  void run_lists(const GatherTask& task, const SourceView& source, const float* init, int64_t init_stride,
                 int64_t num_pixels, LocalMemory& memory, SourcePrefetch& next) const {
    const int64_t samples = task.sample_end - task.sample_begin;
    ConvPixel* pixels = memory.pixels.get<ConvPixel>(num_pixels);
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
    run_tiles(task, classes, counts.classes, pixels, taps, next);
  }

  struct Counts {
    int64_t classes = 0, taps = 0;
  };

  Counts count_classes(const GatherTask& task) const {
    Counts counts;
    each_class(task, [&](size_t, const AxisPhase&, const AxisRun& i_run, int64_t, int64_t, const AxisPhase&,
                         const AxisRun& j_run) {
      ++counts.classes;
      counts.taps += (i_run.tap_end - i_run.tap_begin) * (j_run.tap_end - j_run.tap_begin);
    });
    return counts;
  }

  template <typename Fn>
  void each_class(const GatherTask& task, Fn&& fn) const {
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

  // All tiles of a task in row tiles.
  void run_rows(const GatherTask& task, const SourceView& source, const float* init, int64_t init_stride,
                Scratch& memory, SourcePrefetch& next) const {
    const PackedPanels::Expert& e = panels_.expert(p_.expert(task.group));
    const int64_t tap_size = panels_.tap_rows(e), width = geo_.columns.dest_size;
    const bool reversed = geo_.columns.phases[0].taps[0] == 1;
    RowTile tile;
    tile.step = source.pixel;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      set_panel(task, panel, tile);
      for (size_t phase = 0; phase < geo_.rows.phases.size(); ++phase) {
        const AxisPhase& row = geo_.rows.phases[phase];
        RowTap* taps = memory.get<RowTap>(row.taps.size() + 1);
        for (size_t r = 0; r < row.taps.size(); ++r) {
          taps[r].source = row.taps[r] * source.line;
          for (int s = 0; s < 3; ++s)
            taps[r].weights[s] = (geo_.first_tap[phase] + r * 3 + (reversed ? 2 - s : s)) * tap_size;
        }
        for (const AxisRun& run : row.runs) {
          const int64_t begin = std::max(run.begin, task.row_begin), end = std::min(run.end, task.row_end);
          tile.taps = taps + run.tap_begin;
          tile.num_taps = tile.depth == 0 ? 0 : run.tap_end - run.tap_begin;
          for (int64_t n = 0; n < task.sample_end - task.sample_begin; ++n) {
            tile.first.init = init + n * init_stride;
            for (int64_t i = begin; i < end; ++i) {
              const int64_t line = (task.sample_begin + n) * geo_.rows.dest_size + i * geo_.rows.dest_step + row.phase;
              for (int64_t j = 0; j < width; j += kRowPixels) {
                const int64_t to = (line * width + j) * geo_.dest_channels * element_;
                tile.first.source =
                    source.base + n * source.image + i * geo_.rows.source_step * source.line + j * source.pixel;
                tile.first.residual = op_.residual ? static_cast<const char*>(op_.residual) + to : nullptr;
                tile.first.out = static_cast<char*>(op_.dest) + to;
                tile.left = j > 0;
                tile.right = j + kRowPixels < width;
                kernels_.row[type_](tile);
                next.advance(kRowPixels);
              }
            }
          }
        }
      }
    }
  }

  // All pixels by pairs of full panels in flat tiles. Returns the first panel that is left.
  int64_t run_flat(const GatherTask& task, const SourceView& source, const float* init, int64_t init_stride) const {
    // Pixels follow each other across rows and samples, but those of a sample may have an init of their own.
    const int64_t width = geo_.columns.dest_size, samples = task.sample_end - task.sample_begin;
    const int64_t pixels = samples * (task.row_end - task.row_begin) * width;
    const int64_t runs = init_stride ? samples : 1, count = pixels / runs, tiles = ceil_div(count, kFlatPixels);
    const int64_t first = (task.sample_begin * geo_.rows.dest_size + task.row_begin) * width;
    const float* const from = source.base + task.row_begin * source.line;
    FlatTile tile;
    tile.step = source.pixel;
    int64_t panel = task.panel_begin;
    for (; panel + 1 < task.panel_end; panel += 2) {
      set_panel(task, panel + 1, tile);
      if (tile.vectors < kPanelVectors) break;
      const bool last = tile.last;
      tile.next_weights = tile.weights;
      set_panel(task, panel, tile);
      tile.last = last;
      for (int64_t run = 0; run < runs; ++run) {
        tile.first.init = init + run * init_stride;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t begin = run * count + count * i / tiles, end = run * count + count * (i + 1) / tiles;
          const int64_t to = (first + begin) * geo_.dest_channels * element_;
          tile.first.source = from + begin * source.pixel;
          tile.first.residual = op_.residual ? static_cast<const char*>(op_.residual) + to : nullptr;
          tile.first.out = static_cast<char*>(op_.dest) + to;
          tile.num_pixels = static_cast<int>(end - begin);
          kernels_.flat[type_](tile);
        }
      }
    }
    return panel;
  }

  void set_panel(const GatherTask& task, int64_t panel, PanelTile& tile) const {
    const PackedPanels::Expert& e = panels_.expert(p_.expert(task.group));
    tile.depth = plan_.live_source(task.group);
    tile.live = plan_.live_dest(task.group);
    tile.channels = geo_.dest_channels;
    tile.channel = panel * panel_;
    tile.row = panels_.row(e, panel);
    tile.weights = panels_.weights(e, panel);
    const int64_t vectors = ceil_div(tile.live - tile.channel, kernels_.lanes);
    tile.vectors = static_cast<int>(std::min<int64_t>(kPanelVectors, vectors));
    tile.last = tile.channel + panel_ >= tile.live;
  }

  void run_tiles(const GatherTask& task, const Class* classes, int64_t num_classes, const ConvPixel* pixels,
                 const GatherTap* taps, SourcePrefetch& next) const {
    GatherTile tile;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      set_panel(task, panel, tile);
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

  SourceView view_source(const GatherTask& task) const {
    SourceView view = {nullptr, geo_.source_channels, 0, 0};
    view.line = view.pixel * geo_.columns.source_size;
    view.image = view.line * geo_.rows.source_size;
    view.base = static_cast<const float*>(op_.source) + task.sample_begin * view.image;
    return view;
  }

  // The live channels of the source rows that the task reads, of both inputs, in fp32.
  SourceView copy_source(const GatherTask& task, LocalMemory& memory) const {
    const Axis& rows = geo_.rows;
    const int64_t depth = plan_.live_source(task.group), columns = geo_.columns.source_size;
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
  const float* initial_rows(const GatherTask& task, LocalMemory& memory, int64_t& stride) const {
    const int64_t begin = task.panel_begin * panel_, width = (task.panel_end - task.panel_begin) * panel_;
    const int64_t live = std::min(width, plan_.live_dest(task.group) - begin);
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

  void zero_rows(const GatherTask& task) const {
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
  GatherPlan& plan_;
  const ConvKernels& kernels_;
  int type_;
  int64_t panel_, element_;
  bool in_rows_, flat_;
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
