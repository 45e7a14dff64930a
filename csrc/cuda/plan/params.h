// What the kernel of the routing plan receives.
#pragma once

namespace tdc {

// Tile tables hold at most 2^k samples per tile, k = 0 .. 8.
constexpr int kTileLevels = 9;

struct RoutingPlanParams {
  const long long* groups;   // (batch): the group of each sample
  long long* order;          // (batch): sorted position -> sample
  long long* inverse;        // (batch): sample -> sorted position
  long long* sorted_groups;  // (batch): the group of each sorted position
  int* offsets;              // (num_groups + 1)
  int* tiles;                // (rows of all levels, 3): group or -1, first sorted position, number of samples
  int batch;
  int num_groups;
  int counting_warps;   // warps that count and place samples, each its own slice of the batch
  int levels_per_pass;  // tile levels scanned together: as many as fit in shared memory
};

}  // namespace tdc
