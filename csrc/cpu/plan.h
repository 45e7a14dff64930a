// The routing plan: a stable counting sort of the samples by their timestep group.
#pragma once

#include <cstdint>

namespace tdc {

// groups (batch) -> order (batch): sorted position to sample, inverse (batch): sample to sorted position,
// offsets (num_groups + 1): group g owns the sorted positions [offsets[g], offsets[g + 1]). Samples of one group keep
// their order. Returns -1, or the index of the first id outside [0, num_groups); then nothing is written.
int64_t routing_plan(const int64_t* groups, int64_t* order, int64_t* inverse, int32_t* offsets, int64_t batch,
                     int64_t num_groups);

}  // namespace tdc
