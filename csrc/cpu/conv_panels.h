// The live weights of all experts as packed panels, a bounded number of bytes at a time. The memory of a panel that no
// task needs any more is used for the next one, so that it stays in the cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/conv_kernels.h"
#include "cpu/conv_scratch.h"

namespace tdc {

class PackedPanels {
 public:
  struct Expert {
    int64_t lanes = 0, depth = 0;  // the widest of the groups that use it
    int64_t begin = 0, end = 0;    // panels [begin, end) are in this wave
    int64_t first = 0;             // panels_[first + panel - begin]
  };

  // Starts over. Then call widen() for every expert in use, then next_wave() until it returns false.
  void reset(const Conv2dProblem& problem, const GatherGeometry& geometry, const ConvKernels& kernels,
             const void* weight);
  void widen(int64_t expert, int64_t lanes, int64_t depth);
  // Moves on to the next panels that fit in memory together; none of them is packed yet.
  bool next_wave(int threads);

  int64_t first_expert() const { return first_; }  // of the wave
  int64_t last_expert() const { return last_; }
  const Expert& expert(int64_t index) const { return experts_[index]; }
  int64_t lanes_per_panel() const { return lanes_per_panel_; }
  int64_t count(int64_t lanes) const { return (lanes + lanes_per_panel_ - 1) / lanes_per_panel_; }

  // Before the tasks of a wave run: one of them needs the panels [begin, end).
  void expect(int64_t expert, int64_t begin, int64_t end);
  // The task starts: packs the panels that no other thread has started on, then waits for the others to be ready.
  void prepare(int64_t expert, int64_t begin, int64_t end, int thread);
  // The task is done.
  void release(int64_t expert, int64_t begin, int64_t end, int thread);

  // Floats per packed row: whole vectors, fewer in an expert's last panel.
  int64_t row(const Expert& e, int64_t panel) const;
  // Packed rows per tap: an odd number, so that the taps of a channel do not all map to the same cache sets.
  static int64_t tap_rows(const Expert& e) { return e.depth | 1; }
  const float* weights(const Expert& e, int64_t panel) const { return at(e, panel).packed; }

 private:
  struct Panel {
    std::atomic<uint32_t> state{0};
    std::atomic<uint32_t> tasks{0};  // that need it and are not done
    float* packed = nullptr;
  };
  struct alignas(64) FreeSlots {
    std::vector<float*> slots;
  };

  Panel& at(const Expert& e, int64_t panel) const { return panels_[e.first + panel - e.begin]; }
  int64_t num_taps() const { return geometry_->num_taps(); }
  int64_t filter_taps() const { return static_cast<int64_t>(geometry_->tap_weights.size()); }  // before they are merged
  // Memory for a panel: the last that this thread has freed, else memory that none has used.
  float* take_slot(int thread) noexcept;
  // `filter` is memory for the unmerged taps of a panel, where they are merged.
  void pack(int64_t expert, int64_t panel, float* packed, float* filter) const noexcept;
  void merge_taps(const float* filter, int64_t tap_floats, float* packed) const;

  const Conv2dProblem* problem_ = nullptr;
  const GatherGeometry* geometry_ = nullptr;
  const ConvKernels* kernels_ = nullptr;
  const char* weight_ = nullptr;
  const char* weight_end_ = nullptr;
  int64_t lanes_per_panel_ = 1, first_ = 0, last_ = 0;
  int64_t next_expert_ = 0, next_panel_ = 0;
  std::vector<Expert> experts_;
  Scratch packed_memory_, panels_memory_;
  float* slots_ = nullptr;          // as many as panels
  int64_t slot_floats_ = 0;         // of the largest panel
  std::atomic<int64_t> unused_{0};  // slots from here on have held no panel
  std::vector<FreeSlots> free_;     // of each thread
  Panel* panels_ = nullptr;
};

}  // namespace tdc
