#include "cpu/plan.h"

namespace tdc {

int64_t routing_plan(const int64_t* groups, int64_t* order, int64_t* inverse, int32_t* offsets, int64_t batch,
                     int64_t num_groups) {
  for (int64_t b = 0; b < batch; ++b) {
    if (groups[b] < 0 || groups[b] >= num_groups) return b;
  }
  for (int64_t g = 0; g <= num_groups; ++g) offsets[g] = 0;
  // offsets[g + 1] counts group g, then is the next free position of group g, and so ends as the end of group g.
  for (int64_t b = 0; b < batch; ++b) ++offsets[groups[b] + 1];
  for (int64_t g = 0, start = 0; g < num_groups; ++g) {
    const int32_t size = offsets[g + 1];
    offsets[g + 1] = static_cast<int32_t>(start);
    start += size;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t position = offsets[groups[b] + 1]++;
    order[position] = b;
    inverse[b] = position;
  }
  return -1;
}

}  // namespace tdc
