// Hands out tasks so that a thread tends to get the same ones, call after call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "cpu/conv_scratch.h"

namespace tdc {

// Every thread starts on its own adjacent share of the tasks, equal by cost, so that a sample's activations stay in
// that core's cache from operator to operator; a thread that is done takes tasks from the end of another's share.
class WorkShares {
 public:
  // fn(task, thread); costs.size() < 2^32 tasks.
  template <typename Fn>
  void run(const std::vector<int64_t>& costs, int threads, Fn&& fn) {
    const int64_t tasks = static_cast<int64_t>(costs.size());
    if (tasks == 0) return;
    threads_ = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    if (threads_ == 1) {
      for (int64_t task = 0; task < tasks; ++task) fn(task, 0);
      return;
    }
    split(costs);
    parallel_for(threads_, threads_, [&](int64_t, int thread) {
      for (int64_t task; (task = next(thread)) >= 0;) fn(task, thread);
    });
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> range;  // begin in the upper half, end in the lower
  };

  void split(const std::vector<int64_t>& costs) {
    shares_ = memory_.get<Share>(threads_);
    int64_t total = 0, before = 0;
    for (int64_t cost : costs) total += cost;
    uint64_t begin = 0, end = 0;
    for (int t = 0; t < threads_; ++t) {
      // A task belongs to the share that contains its midpoint.
      const double limit = static_cast<double>(total) * (t + 1) / threads_;
      while (end < costs.size() && (t + 1 == threads_ || before + costs[end] * 0.5 < limit)) before += costs[end++];
      new (&shares_[t].range) std::atomic<uint64_t>(begin << 32 | end);
      begin = end;
    }
  }

  int64_t next(int thread) {
    for (int k = 0; k < threads_; ++k) {
      std::atomic<uint64_t>& range = shares_[(thread + k) % threads_].range;
      uint64_t seen = range.load(std::memory_order_relaxed);
      for (;;) {
        const uint64_t begin = seen >> 32, end = seen & 0xffffffffu;
        if (begin >= end) break;
        const uint64_t left = k == 0 ? (begin + 1) << 32 | end : begin << 32 | (end - 1);
        if (range.compare_exchange_weak(seen, left, std::memory_order_relaxed))
          return static_cast<int64_t>(k == 0 ? begin : end - 1);
      }
    }
    return -1;
  }

  Scratch memory_;
  Share* shares_ = nullptr;
  int threads_ = 1;
};

}  // namespace tdc
