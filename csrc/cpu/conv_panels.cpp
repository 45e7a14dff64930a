#include "cpu/conv_panels.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <thread>

namespace tdc {
namespace {

constexpr int64_t kPackedLimit = int64_t{6} << 20;  // bytes of packed weights at a time

// A panel is packed by the first thread that needs it.
enum PanelState : uint32_t { kUnpacked, kBeingPacked, kReady };

}  // namespace

void PackedPanels::reset(const Conv2dProblem& problem, const GatherGeometry& geometry, const ConvKernels& kernels,
                         const void* weight) {
  problem_ = &problem, geometry_ = &geometry, kernels_ = &kernels;
  weight_ = static_cast<const char*>(weight);
  const int64_t sizes[5] = {problem.num_experts, problem.out_channels, problem.in_channels, problem.filter_height,
                            problem.filter_width};
  int64_t last = 0;
  for (int d = 0; d < 5; ++d) last += (sizes[d] - 1) * problem.weight_strides[d];
  weight_end_ = weight_ + (last + 1) * (problem.dtype == DType::kFloat32 ? 4 : 2);
  lanes_per_panel_ = kernels.lanes * kPanelVectors;
  next_expert_ = next_panel_ = 0;
  experts_.assign(problem.num_experts, {});
}

void PackedPanels::widen(int64_t expert, int64_t lanes, int64_t depth) {
  Expert& e = experts_[expert];
  e.lanes = std::max(e.lanes, lanes);
  e.depth = std::max(e.depth, depth);
}

int64_t PackedPanels::row(const Expert& e, int64_t panel) const {
  const int64_t lanes = std::min(lanes_per_panel_, e.lanes - panel * lanes_per_panel_);
  return (lanes + kernels_->lanes - 1) / kernels_->lanes * kernels_->lanes;
}

bool PackedPanels::next_wave(int threads) {
  if (next_expert_ >= problem_->num_experts) return false;
  first_ = next_expert_;
  int64_t panels = 0;
  slot_floats_ = 0;
  for (bool full = false; next_expert_ < problem_->num_experts && !full;) {
    Expert& e = experts_[next_expert_];
    last_ = next_expert_;
    e.begin = next_panel_, e.first = panels;
    const int64_t total = count(e.lanes);
    for (; next_panel_ < total; ++next_panel_, ++panels) {
      const int64_t floats = std::max(slot_floats_, num_taps() * tap_rows(e) * row(e, next_panel_));
      full = panels > 0 && (panels + 1) * floats * 4 > kPackedLimit;
      if (full) break;
      slot_floats_ = floats;
    }
    e.end = next_panel_;
    if (!full) ++next_expert_, next_panel_ = 0;
  }
  slots_ = packed_memory_.get<float>(std::max<int64_t>(panels * slot_floats_, 1));
  unused_.store(0, std::memory_order_relaxed);
  free_.resize(std::max(1, threads));
  for (FreeSlots& free : free_) free.slots.clear();
  panels_ = panels_memory_.get<Panel>(panels + 1);
  for (int64_t i = 0; i < panels; ++i) new (panels_ + i) Panel;
  return true;
}

void PackedPanels::expect(int64_t expert, int64_t begin, int64_t end) {
  const Expert& e = experts_[expert];
  for (int64_t panel = begin; panel < end; ++panel) at(e, panel).tasks.fetch_add(1, std::memory_order_relaxed);
}

void PackedPanels::prepare(int64_t expert, int64_t begin, int64_t end, int thread) {
  const Expert& e = experts_[expert];
  // Memory first, for the largest panel: once a panel's state says that it is being packed, nothing may throw, since
  // the other threads wait for it.
  static thread_local Scratch memory;
  float* filter = geometry_->merged ? memory.get<float>(filter_taps() * tap_rows(e) * row(e, begin)) : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    Panel& panel = at(e, i);
    uint32_t seen = panel.state.load(std::memory_order_relaxed);
    if (seen == kUnpacked && panel.state.compare_exchange_strong(seen, kBeingPacked, std::memory_order_relaxed)) {
      panel.packed = take_slot(thread);
      pack(expert, i, panel.packed, filter);
      panel.state.store(kReady, std::memory_order_release);
    }
  }
  for (int64_t i = begin; i < end; ++i)
    for (int spins = 0; at(e, i).state.load(std::memory_order_acquire) != kReady;)
      if (++spins > 256) std::this_thread::yield();
}

void PackedPanels::release(int64_t expert, int64_t begin, int64_t end, int thread) {
  const Expert& e = experts_[expert];
  for (int64_t i = begin; i < end; ++i) {
    Panel& panel = at(e, i);
    // Acquires what the other tasks have read: the next panel in this memory is written after that.
    if (panel.tasks.fetch_sub(1, std::memory_order_acq_rel) == 1) free_[thread].slots.push_back(panel.packed);
  }
}

float* PackedPanels::take_slot(int thread) noexcept {
  std::vector<float*>& free = free_[thread].slots;
  if (free.empty()) return slots_ + unused_.fetch_add(1, std::memory_order_relaxed) * slot_floats_;
  float* slot = free.back();
  free.pop_back();
  return slot;
}

void PackedPanels::pack(int64_t expert, int64_t panel, float* packed, float* filter) const noexcept {
  const Expert& e = experts_[expert];
  const int64_t element = problem_->dtype == DType::kFloat32 ? 4 : 2;
  const int64_t first = expert * problem_->weight_strides[0] + panel * lanes_per_panel_ * geometry_->lane_stride;
  PanelPack pack;
  pack.weights = weight_ + first * element;
  pack.end = weight_end_;
  pack.lanes = std::min(lanes_per_panel_, e.lanes - panel * lanes_per_panel_);
  pack.lane_stride = geometry_->lane_stride;
  pack.depth_stride = geometry_->depth_stride;
  pack.depth = e.depth;
  pack.taps = geometry_->tap_weights.data();
  pack.tap_at = geometry_->tap_at.empty() ? nullptr : geometry_->tap_at.data();
  pack.num_taps = filter_taps();
  pack.packed = geometry_->merged ? filter : packed;
  pack.tap_rows = tap_rows(e);
  pack.row = row(e, panel);
  kernels_->pack[static_cast<int>(problem_->dtype)](pack);
  if (geometry_->merged) merge_taps(filter, pack.tap_rows * pack.row, packed);
}

// Adds the packed weights of the filter that meet in a tap, for every tap.
void PackedPanels::merge_taps(const float* filter, int64_t tap_floats, float* packed) const {
  for (const TapFilter& tap : geometry_->taps) {
    bool first = true;
    for (int64_t r = tap.rows.begin; r < tap.rows.end; ++r) {
      for (int64_t s = tap.columns.begin; s < tap.columns.end; ++s, first = false) {
        const float* from = filter + (r * problem_->filter_width + s) * tap_floats;
        if (first)
          std::memcpy(packed, from, tap_floats * sizeof(float));
        else
          kernels_->add(from, packed, tap_floats);
      }
    }
    packed += tap_floats;
  }
}

}  // namespace tdc
