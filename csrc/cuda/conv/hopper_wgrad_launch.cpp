#include <algorithm>
#include <cstddef>
#include <limits>

#include "cuda/conv/hopper_launch.h"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int kLeastStages = 3;

int64_t in_tiles(const ConvArguments& a) { return ceil_div(a.in_channels, kHopperUnit); }
int64_t out_tiles(const ConvArguments& a) { return ceil_div(a.out_channels, kHopperUnit); }
int64_t units_of_expert(const ConvArguments& a) { return kHopperUnitTaps * in_tiles(a) * out_tiles(a); }
int64_t patches_of_sample(const ConvArguments& a) { return ceil_div(a.height, 8) * ceil_div(a.width, 8); }

// As many stages as fit; 0 where too few do.
int stages(const ConvArguments& a, const Device& device) {
  int count = kHopperWgradMostStages;
  const int groups = static_cast<int>(a.num_groups);
  while (count > 0 && hopper_wgrad_shared_bytes(count, groups) > device.shared_limit) --count;
  return count < kLeastStages ? 0 : count;
}

// As many blocks as SMs; where there are fewer units, so many that even groups cut each into equal parts.
int blocks(const ConvArguments& a, const Device& device) {
  const int64_t units = std::min({a.num_experts, a.num_groups, std::max<int64_t>(a.batch, 1)}) * units_of_expert(a);
  const int64_t processors = device.multiprocessors;
  return static_cast<int>(units < processors ? processors / units * units : processors);
}

ConvHopperWgradParams params_of(const ConvArguments& a, const Device& device) {
  ConvHopperWgradParams p{};
  p.x = tensor_map_of(a.x, {a.in_channels, a.width, a.height, a.batch}, {kHopperDepth, 10, 8, 1}, a);
  p.dy = tensor_map_of(a.dy, {a.out_channels, a.width, a.height, a.batch}, {kHopperDepth, 8, 8, 1}, a);
  p.dweight = pointer<void>(a.dweight);
  p.parts = pointer<void>(a.workspace);
  p.routing = routing_of(a);
  p.in_channels = static_cast<int>(a.in_channels);
  p.out_channels = static_cast<int>(a.out_channels);
  p.in_tiles = static_cast<int>(in_tiles(a));
  p.out_tiles = static_cast<int>(out_tiles(a));
  p.patches_down = static_cast<int>(ceil_div(a.height, 8));
  p.patches_across = static_cast<int>(ceil_div(a.width, 8));
  p.stages = stages(a, device);
  p.blocks = blocks(a, device);
  return p;
}

}  // namespace

std::string hopper_wgrad_refusal(const ConvArguments& a, const Device& device) {
  const std::string common = hopper_refusal(a, device);
  if (!common.empty()) return common;
  if (is_pointwise(a)) return "it has 3x3 filters in wgrad";
  if (a.num_groups > kHopperWgradMostGroups) {
    return "it has at most " + std::to_string(kHopperWgradMostGroups) + " groups in wgrad";
  }
  if (stages(a, device) == 0) return "its stages do not fit into shared memory";
  // The line of all work is counted in 32 bits.
  const int64_t most = std::numeric_limits<int>::max() / units_of_expert(a) / patches_of_sample(a);
  if (a.batch > most) return "it has fewer than 2^31 patches and units in wgrad";
  return "";
}

std::vector<Launch> launch_hopper_wgrad(const ConvArguments& a, const Device& device) {
  const ConvHopperWgradParams p = params_of(a, device);
  const int groups = static_cast<int>(a.num_groups);
  const std::string name = "tdc_conv_hopper_wgrad_", type = storage_name(a);
  Launch products = launch_of(name + type, static_cast<unsigned>(p.blocks), kHopperThreads,
                              hopper_wgrad_shared_bytes(p.stages, groups), p, a);
  products.tensor_maps = {offsetof(ConvHopperWgradParams, x), offsetof(ConvHopperWgradParams, dy)};
  const int table = groups * static_cast<int>(sizeof(HopperWgradGroup));
  const unsigned reducers = blocks_of({a.num_experts, units_of_expert(a), kHopperReduceBlocks}, a);
  return {products, launch_of(name + "reduce_" + type, reducers, kHopperReduceThreads, table, p, a)};
}

size_t hopper_wgrad_workspace(const ConvArguments& a, const Device& device) {
  return a.dweight ? static_cast<size_t>(2 * blocks(a, device) * kHopperPartBytes) : 0;
}

}  // namespace tdc
