// Fetches the source of a task of forward or dgrad into the cache while another task is computed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/conv_gather_plan.h"

namespace tdc {

class SourcePrefetch {
 public:
  // The fp32 source of task `index`, a little after each of the `pixels` that the other task computes.
  void set(const GatherPlan& plan, const GatherGeometry& geometry, const void* source, int64_t index, int64_t pixels) {
    const GatherTask& task = plan.tasks()[index];
    const Axis& rows = geometry.rows;
    const int64_t line = geometry.columns.source_size;
    const int64_t begin = std::max<int64_t>(0, task.row_begin * rows.source_step + rows.min_tap);
    const int64_t end = std::min(rows.source_size, (task.row_end - 1) * rows.source_step + rows.max_tap + 1);
    const int64_t last = (task.sample_end - 1) * rows.source_size + end;
    stride_ = geometry.source_channels;
    live_ = plan.live_source(task.group);
    at_ = static_cast<const float*>(source) + (task.sample_begin * rows.source_size + begin) * line * stride_;
    left_ = live_ == 0 ? 0 : std::max<int64_t>(0, (last - task.sample_begin * rows.source_size - begin) * line);
    per_pixel_ = ceil_div(left_ * 64, std::max<int64_t>(1, pixels));
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

}  // namespace tdc
