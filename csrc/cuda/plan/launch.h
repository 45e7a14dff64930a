// Plans the launch that sorts a batch by group and writes its tile tables.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch/launch.h"

namespace tdc {

// Device addresses; see RoutingPlanParams for the shapes.
struct PlanArguments {
  uintptr_t groups = 0;
  uintptr_t order = 0;
  uintptr_t inverse = 0;
  uintptr_t sorted_groups = 0;
  uintptr_t offsets = 0;
  uintptr_t tiles = 0;
  int64_t batch = 0;
  int64_t num_groups = 0;
};

// Whether shared memory holds the counters of num_groups groups: at most about 20,000 on sm_80, 29,000 on sm_90.
bool routing_plan_supported(int64_t num_groups, const Device& device);

// One launch of one block, which makes three passes over the batch: count, place, write tiles. Up to some thousand
// samples its time is that of a few barriers; beyond, it grows with the batch: 65536 samples are 64 steps for each of
// 32 warps. Throws std::invalid_argument for sizes that do not fit. On the device a group id out of
// range traps.
std::vector<Launch> launch_routing_plan(const PlanArguments& arguments, const Device& device);

}  // namespace tdc
