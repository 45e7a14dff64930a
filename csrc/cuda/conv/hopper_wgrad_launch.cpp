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

struct UnitChoice {
  const char* name;
  int in, stage_bytes;
  int64_t part_bytes;
};

template <class Unit>
UnitChoice choice_of(const char* name) {
  return {name, Unit::kIn, Unit::kStageBytes, kHopperPartBytes<Unit>};
}

// Tiles along the input channels; none has channels of both inputs.
int64_t in_tiles(const ConvArguments& a, const UnitChoice& unit) {
  return ceil_div(a.x_channels(), unit.in) + ceil_div(a.x2_channels, unit.in);
}

// Whether units have one tap each.
bool by_taps(const ConvArguments& a) { return takes_rows(a) || takes_strides(a); }

// In the form of rows the unit that loads the fewest channels per pixel; of equals, the larger.
UnitChoice choose_unit(const ConvArguments& a) {
  if (!by_taps(a)) return choice_of<HopperFilterUnit>("");
  UnitChoice best = choice_of<HopperRowsUnit<3>>("rows384_");
  const auto loaded = [&](const UnitChoice& unit) { return in_tiles(a, unit) * (unit.in + kHopperUnit); };
  for (const UnitChoice& unit : {choice_of<HopperRowsUnit<2>>("rows256_"), choice_of<HopperRowsUnit<1>>("rows128_")}) {
    if (loaded(unit) < loaded(best)) best = unit;
  }
  return best;
}

// Filter rows, or taps, that units have one of.
int64_t rows_of_filter(const ConvArguments& a) { return by_taps(a) ? a.filter_height * a.filter_width : 3; }
int64_t out_tiles(const ConvArguments& a) { return ceil_div(a.out_channels, kHopperUnit); }
int64_t units_of_expert(const ConvArguments& a, const UnitChoice& unit) {
  return rows_of_filter(a) * in_tiles(a, unit) * out_tiles(a);
}

// Of stride 2: patches of 8 x 8 pixels of a sample or of 4 x 4 of four, whichever are fewer when groups are even.
struct StridedPatches {
  int64_t side, samples, down, across;

  StridedPatches(const ConvArguments& a, int64_t pixels)
      : side(pixels), samples(64 / (pixels * pixels)), down(ceil_div(a.out_height(), pixels)),
        across(ceil_div(a.out_width(), pixels)) {}

  int64_t of_even_groups(const ConvArguments& a) const {
    const int64_t groups = std::max<int64_t>(1, std::min(a.num_groups, a.batch));
    return groups * ceil_div(ceil_div(a.batch, groups), samples) * down * across;
  }
};

StridedPatches strided_patches(const ConvArguments& a) {
  const StridedPatches large(a, 8), small(a, 4);
  return small.of_even_groups(a) < large.of_even_groups(a) ? small : large;
}

// Of all groups, at most.
int64_t patches(const ConvArguments& a) {
  if (takes_strides(a)) {
    const StridedPatches own = strided_patches(a);
    return (a.batch / own.samples + std::min(a.num_groups, a.batch)) * own.down * own.across;
  }
  return takes_rows(a) ? a.batch * a.height * a.width / 64 + std::min(a.num_groups, a.batch)
                       : a.batch * ceil_div(a.height, 8) * ceil_div(a.width, 8);
}

// As many stages as fit; 0 where too few do.
int stages(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  int count = kHopperWgradMostStages;
  const int groups = static_cast<int>(a.num_groups);
  while (count > 0 && hopper_wgrad_shared_bytes(unit.stage_bytes, count, groups) > device.shared_limit) --count;
  return count < kLeastStages ? 0 : count;
}

// As many blocks as SMs; where there are fewer units, so many that even groups cut each into equal parts.
int blocks(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  const int64_t experts = std::min({a.num_experts, a.num_groups, std::max<int64_t>(a.batch, 1)});
  const int64_t units = experts * units_of_expert(a, unit), processors = device.multiprocessors;
  return static_cast<int>(units < processors ? processors / units * units : processors);
}

// Bytes of the parts of units, and of the sums of a bias, which come after them.
int64_t part_bytes(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  return 2 * blocks(a, device, unit) * unit.part_bytes;
}
int64_t bias_bytes(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  const int64_t units = a.num_experts * out_tiles(a) * rows_of_filter(a);
  return (2 * blocks(a, device, unit) + units) * kHopperUnit * static_cast<int64_t>(sizeof(float));
}

ConvHopperWgradParams params_of(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  ConvHopperWgradParams p{};
  const int64_t pixels = a.height * a.width;
  if (takes_strides(a)) {
    const StridedPatches own = strided_patches(a);
    const TensorSizes box = {kHopperDepth, own.side, own.side, own.samples};
    int plane = 0;
    for (TensorMap* map : {&p.x, &p.x_even_odd, &p.x_odd_even, &p.x_odd_odd}) {
      *map = plane_of(a.x, a.in_channels, plane++, box, a);
    }
    p.dy = tensor_map_of(a.dy, {a.out_channels, a.out_width(), a.out_height(), a.batch}, box, a);
    p.patch_samples = static_cast<int>(own.samples);
    p.patch_side = static_cast<int>(own.side);
    p.patches_down = static_cast<int>(own.down);
    p.patches_across = static_cast<int>(own.across);
  } else if (takes_rows(a)) {
    const TensorSizes rows = {kHopperDepth, 64, 1, 1}, images = {kHopperDepth, a.width, a.height, 64 / pixels};
    const auto map_of = [&](uintptr_t address, int64_t channels) {
      if (a.filter_height == 1) return tensor_map_of(address, {channels, a.batch * pixels, 1, 1}, rows, a);
      return tensor_map_of(address, {channels, a.width, a.height, a.batch}, images, a);
    };
    p.x = map_of(a.x, a.x_channels());
    if (a.x2_channels) p.x2 = map_of(a.x2, a.x2_channels);
    p.dy = tensor_map_of(a.dy, {a.out_channels, a.batch * pixels, 1, 1}, rows, a);
  } else {
    const auto map_of = [&](uintptr_t address, int64_t channels) {
      return tensor_map_of(address, {channels, a.width, a.height, a.batch}, {kHopperDepth, 10, 8, 1}, a);
    };
    p.x = map_of(a.x, a.x_channels());
    if (a.x2_channels) p.x2 = map_of(a.x2, a.x2_channels);
    p.dy = tensor_map_of(a.dy, {a.out_channels, a.width, a.height, a.batch}, {kHopperDepth, 8, 8, 1}, a);
    p.patches_down = static_cast<int>(ceil_div(a.height, 8));
    p.patches_across = static_cast<int>(ceil_div(a.width, 8));
  }
  p.dweight = pointer<void>(a.dweight);
  p.parts = pointer<void>(a.workspace);
  if (sums_bias_with_weight(a)) {
    p.dbias = pointer<void>(a.dbias);
    p.bias_sums = pointer<float>(a.workspace + part_bytes(a, device, unit));
  }
  p.routing = routing_of(a);
  p.in_channels = static_cast<int>(a.in_channels);
  p.out_channels = static_cast<int>(a.out_channels);
  p.in_tiles = static_cast<int>(in_tiles(a, unit));
  p.out_tiles = static_cast<int>(out_tiles(a));
  p.seam = static_cast<int>(a.x_channels());
  p.pixels = static_cast<int>(pixels);
  p.taps = static_cast<int>(a.filter_height * a.filter_width);
  p.rows = static_cast<int>(rows_of_filter(a));
  p.stages = stages(a, device, unit);
  p.blocks = blocks(a, device, unit);
  return p;
}

}  // namespace

std::string hopper_wgrad_refusal(const ConvArguments& a, const Device& device) {
  const std::string common = hopper_refusal(a, device);
  if (!common.empty()) return common;
  if (takes_strides(a)) {
    const std::string strided = hopper_strided_refusal(a, device);
    if (!strided.empty()) return strided;
  }
  if (a.upsample > 1) return "its wgrad does not upsample images";
  if (a.num_groups > kHopperWgradMostGroups) {
    return "it has at most " + std::to_string(kHopperWgradMostGroups) + " groups in wgrad";
  }
  const UnitChoice unit = choose_unit(a);
  if (stages(a, device, unit) == 0) return "its stages do not fit into shared memory";
  // The line of all work is counted in 32 bits.
  if (patches(a) > std::numeric_limits<int>::max() / units_of_expert(a, unit)) {
    return "it has fewer than 2^31 patches and units in wgrad";
  }
  return "";
}

std::vector<Launch> launch_hopper_wgrad(const ConvArguments& a, const Device& device) {
  const UnitChoice unit = choose_unit(a);
  const ConvHopperWgradParams p = params_of(a, device, unit);
  const int groups = static_cast<int>(a.num_groups);
  const std::string name = "tdc_conv_hopper_wgrad_", type = std::string(unit.name) + storage_name(a);
  Launch products = launch_of(name + type, static_cast<unsigned>(p.blocks), kHopperThreads,
                              hopper_wgrad_shared_bytes(unit.stage_bytes, p.stages, groups), p, a);
  products.tensor_maps = {offsetof(ConvHopperWgradParams, x), offsetof(ConvHopperWgradParams, dy)};
  if (a.x2_channels) products.tensor_maps.push_back(offsetof(ConvHopperWgradParams, x2));
  if (takes_strides(a)) {
    for (size_t offset : {offsetof(ConvHopperWgradParams, x_even_odd), offsetof(ConvHopperWgradParams, x_odd_even),
                          offsetof(ConvHopperWgradParams, x_odd_odd)}) {
      products.tensor_maps.push_back(static_cast<unsigned>(offset));
    }
  }
  const int table = groups * static_cast<int>(sizeof(HopperWgradGroup));
  const unsigned reducers = blocks_of({a.num_experts, units_of_expert(a, unit), kHopperReduceBlocks}, a);
  return {products, launch_of(name + "reduce_" + type, reducers, kHopperReduceThreads, table, p, a)};
}

size_t hopper_wgrad_workspace(const ConvArguments& a, const Device& device) {
  const UnitChoice unit = choose_unit(a);
  if (!a.dweight) return 0;
  return part_bytes(a, device, unit) + (sums_bias_with_weight(a) ? bias_bytes(a, device, unit) : 0);
}

}  // namespace tdc
