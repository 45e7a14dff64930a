#include "cuda/plan/launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/plan/params.h"

namespace tdc {
namespace {

constexpr int64_t kWarpThreads = 32, kMostWarps = 32, kMostRows = int64_t{1} << 26;

// Ints of shared memory with `tables` counters per group.
int64_t shared_ints(int64_t num_groups, int64_t tables) {
  return kTileLevels * kWarpThreads + num_groups + 1 + tables * num_groups;
}

// How many counters per group the device's shared memory holds.
int64_t most_tables(int64_t num_groups, const Device& device) {
  const int64_t ints = device.shared_limit / 4 - shared_ints(num_groups, 0);
  return ints < 0 ? 0 : ints / std::max<int64_t>(num_groups, 1);
}

}  // namespace

bool routing_plan_supported(int64_t num_groups, const Device& device) {
  return num_groups >= 1 && most_tables(num_groups, device) >= 1;
}

std::vector<Launch> launch_routing_plan(const PlanArguments& a, const Device& device) {
  const std::string shapes = "groups (" + std::to_string(a.batch) + "), " + std::to_string(a.num_groups) + " groups";
  // Tile tables have at most 3 * 9 ints per sample, and positions are 32-bit.
  if (a.batch < 0 || a.batch > kMostRows) throw std::invalid_argument("routing_plan: batch out of range: " + shapes);
  if (!routing_plan_supported(a.num_groups, device)) {
    throw std::invalid_argument("routing_plan: shared memory does not hold the counters of this many groups: " +
                                shapes);
  }
  const int64_t tables = most_tables(a.num_groups, device);
  const int64_t warps_of_batch = std::max<int64_t>(1, (a.batch + kWarpThreads - 1) / kWarpThreads);
  const int64_t warps_of_groups = (a.num_groups + kWarpThreads - 1) / kWarpThreads;

  RoutingPlanParams p{};
  p.groups = reinterpret_cast<const long long*>(a.groups);
  p.order = reinterpret_cast<long long*>(a.order);
  p.inverse = reinterpret_cast<long long*>(a.inverse);
  p.sorted_groups = reinterpret_cast<long long*>(a.sorted_groups);
  p.offsets = reinterpret_cast<int*>(a.offsets);
  p.tiles = reinterpret_cast<int*>(a.tiles);
  p.batch = static_cast<int>(a.batch);
  p.num_groups = static_cast<int>(a.num_groups);
  p.counting_warps = static_cast<int>(std::min({tables, warps_of_batch, kMostWarps}));
  p.levels_per_pass = static_cast<int>(std::min<int64_t>(tables, kTileLevels));

  Launch launch;
  launch.kernel = "tdc_routing_plan";
  launch.grid[0] = launch.grid[1] = launch.grid[2] = 1;
  // A small plan waits for fewer warps at its barriers.
  const int64_t warps = std::min(kMostWarps, std::max<int64_t>({4, warps_of_batch, warps_of_groups}));
  launch.threads = static_cast<unsigned>(warps * kWarpThreads);
  launch.shared_bytes =
      static_cast<unsigned>(4 * shared_ints(a.num_groups, std::max(p.counting_warps, p.levels_per_pass)));
  launch.params = bytes_of(p);
  launch.shapes = shapes;
  return {launch};
}

}  // namespace tdc
