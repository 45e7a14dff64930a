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
  int64_t part_bytes, most_patch;
};

template <class Unit>
UnitChoice choice_of(const char* name) {
  return {name, Unit::kIn, Unit::kStageBytes, kHopperPartBytes<Unit>, kHopperMostPatch<Unit>};
}

// Tiles along the input channels; none has channels of both inputs.
int64_t in_tiles(const ConvArguments& a, const UnitChoice& unit) {
  return ceil_div(a.x_channels(), unit.in) + ceil_div(a.x2_channels, unit.in);
}

// Whether patches are boxes of pixels in the form of rows; whether units have one tap each.
bool by_boxes(const ConvArguments& a) { return takes_strides(a) || takes_upsampled(a); }
bool by_taps(const ConvArguments& a) { return takes_rows(a) || by_boxes(a); }

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

// Of stride 2 pixels of dy, of upsampled images those of x: patches of 8 x 8 pixels of a sample or of 4 x 4 of four,
// whichever are fewer when groups are even.
struct BoxPatches {
  int64_t side, samples, down, across;

  BoxPatches(const ConvArguments& a, int64_t pixels)
      : side(pixels), samples(64 / (pixels * pixels)),
        down(ceil_div(a.upsample > 1 ? a.height : a.out_height(), pixels)),
        across(ceil_div(a.upsample > 1 ? a.width : a.out_width(), pixels)) {}

  int64_t of_even_groups(const ConvArguments& a) const {
    const int64_t groups = std::max<int64_t>(1, std::min(a.num_groups, a.batch));
    return groups * ceil_div(ceil_div(a.batch, groups), samples) * down * across;
  }
};

BoxPatches box_patches(const ConvArguments& a) {
  const BoxPatches large(a, 8), small(a, 4);
  // The kernel sums samples one after the other.
  if (takes_strides(a) && a.dsample_bias && small.down * small.across > 1) return large;
  return small.of_even_groups(a) < large.of_even_groups(a) ? small : large;
}

// Of all groups, at most.
int64_t patches(const ConvArguments& a) {
  if (by_boxes(a)) {
    const BoxPatches own = box_patches(a);
    return (a.batch / own.samples + std::min(a.num_groups, a.batch)) * own.down * own.across;
  }
  return takes_rows(a) ? a.batch * a.height * a.width / 64 + std::min(a.num_groups, a.batch)
                       : a.batch * ceil_div(a.height, 8) * ceil_div(a.width, 8);
}

// As many stages as fit; 0 where too few do.
int stages(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  return most_stages(kLeastStages, kHopperWgradMostStages, a, device, [&](int count, int num_groups) {
    return hopper_wgrad_shared_bytes(unit.stage_bytes, count, num_groups);
  });
}

// As many blocks as SMs. Where there are fewer units, so many of them work when groups are even that each unit is cut
// into equal parts.
int blocks(const Device& device) { return device.multiprocessors; }
int equal_parts(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  const int64_t experts = std::min({a.num_experts, a.num_groups, std::max<int64_t>(a.batch, 1)});
  const int64_t units = experts * units_of_expert(a, unit), processors = device.multiprocessors;
  return static_cast<int>(units < processors ? processors / units * units : processors);
}

// Where biases have gradients, whether these are sums of the samples' sums.
bool sums_samples(const ConvArguments& a) { return a.dsample_bias || takes_upsampled(a); }

// The windows of upsampled images are summed in strips: enough to give every SM two blocks.
struct WindowStrips {
  int64_t channel_tiles, lines, strips;

  WindowStrips(const ConvArguments& a, const Device& device)
      : channel_tiles(ceil_div(a.out_channels, kWindowSumChunks * per_chunk(a))) {
    const int64_t all = a.out_height() + 1, blocks = std::max<int64_t>(1, a.batch * channel_tiles);
    lines = ceil_div(all, std::min(all, ceil_div(2 * device.multiprocessors, blocks)));
    strips = ceil_div(all, lines);
  }
};

// Bytes of what lies in the workspace, in this order; all are multiples of 16.
struct Workspace {
  int64_t windows = 0, parts = 0, bias_sums = 0, sample_sums = 0;

  Workspace(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
    const int64_t unit_sums = kHopperUnit * static_cast<int64_t>(sizeof(float));
    const int64_t of_all_samples = a.batch * out_tiles(a) * unit_sums, number = blocks(device);
    const bool biases = hopper_sums_biases(a);
    parts = 2 * number * unit.part_bytes;
    if (takes_upsampled(a)) {
      windows = a.batch * (a.out_height() + 1) * (a.out_width() + 1) * a.out_channels * element_bytes(a);
      if (biases) sample_sums = WindowStrips(a, device).strips * of_all_samples;
    } else if (biases && sums_samples(a)) {
      bias_sums = number * unit_sums;
      sample_sums = of_all_samples;
    } else if (biases) {
      bias_sums = (2 * number + a.num_experts * out_tiles(a) * rows_of_filter(a)) * unit_sums;
    }
  }
  int64_t total() const { return windows + parts + bias_sums + sample_sums; }
};

ConvHopperWgradParams params_of(const ConvArguments& a, const Device& device, const UnitChoice& unit) {
  ConvHopperWgradParams p{};
  const Workspace workspace(a, device, unit);
  const int64_t pixels = a.height * a.width;
  int64_t sample_rows = pixels;
  bool whole_samples = false;  // patches are of one sample
  if (by_boxes(a)) {
    const BoxPatches own = box_patches(a);
    const TensorSizes box = {kHopperDepth, own.side, own.side, own.samples};
    const auto set_planes = [&](TensorMap& even_even, uintptr_t address, int64_t channels, const ConvArguments& image) {
      int plane = 0;
      for (TensorMap* map : {&even_even, &p.even_odd, &p.odd_even, &p.odd_odd}) {
        *map = plane_of(address, channels, plane++, box, image);
      }
    };
    if (takes_upsampled(a)) {
      ConvArguments windows = a;
      windows.height = a.out_height() + 1, windows.width = a.out_width() + 1;
      p.x = tensor_map_of(a.x, {a.in_channels, a.width, a.height, a.batch}, box, a);
      set_planes(p.dy, a.workspace, a.out_channels, windows);
      p.upsampled = 1;
    } else {
      set_planes(p.x, a.x, a.in_channels, a);
      p.dy = tensor_map_of(a.dy, {a.out_channels, a.out_width(), a.out_height(), a.batch}, box, a);
    }
    sample_rows = own.side * own.side * own.down * own.across;
    whole_samples = own.samples == 1;
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
    sample_rows = 64 * ceil_div(a.height, 8) * ceil_div(a.width, 8);
    whole_samples = true;
  }
  p.dweight = pointer<void>(a.dweight);
  p.parts = pointer<void>(a.workspace + workspace.windows);
  if (hopper_sums_biases(a)) {
    const uintptr_t sums = a.workspace + workspace.windows + workspace.parts;
    p.dbias = pointer<void>(a.dbias);
    p.dsample_bias = pointer<void>(a.dsample_bias);
    if (workspace.bias_sums) p.bias_sums = pointer<float>(sums);
    if (workspace.sample_sums) p.sample_sums = pointer<float>(sums + workspace.bias_sums);
  }
  p.sample_rows = static_cast<int>(sample_rows);
  p.by_sample_rows = fast_divisor(sample_rows);
  p.by_turn_rows = fast_divisor(sums_samples(a) && whole_samples ? sample_rows : 64);
  p.sample_parts = takes_upsampled(a) ? static_cast<int>(WindowStrips(a, device).strips) : 1;
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
  p.blocks = blocks(device);
  p.equal_parts = equal_parts(a, device, unit);
  return p;
}

Launch launch_window_sums(const ConvArguments& a, const Device& device, const ConvHopperWgradParams& wgrad) {
  const WindowStrips strips(a, device);
  ConvWindowSumParams p{};
  p.dy = pointer<const void>(a.dy);
  p.windows = pointer<void>(a.workspace);
  p.sample_sums = wgrad.sample_sums;
  p.routing = wgrad.routing;
  p.height = static_cast<int>(a.out_height());
  p.width = static_cast<int>(a.out_width());
  p.by_columns = fast_divisor(p.width + 1);
  p.channels = static_cast<int>(a.out_channels);
  p.strips = static_cast<int>(strips.strips);
  p.lines = static_cast<int>(strips.lines);
  p.channel_tiles = static_cast<int>(strips.channel_tiles);
  p.pitch = wgrad.out_tiles * kHopperUnit;
  return launch_of(std::string("tdc_conv_hopper_window_sums_") + storage_name(a),
                   blocks_of({a.batch, strips.strips, strips.channel_tiles}, a), kWindowSumThreads, 0, p, a);
}

}  // namespace

bool hopper_sums_biases(const ConvArguments& a) {
  if (!a.dweight || !(a.dbias || a.dsample_bias)) return false;
  // Of images of few pixels a patch has more samples than its sums are worth.
  constexpr int64_t kLeastPixels = 16;
  return !a.dsample_bias || !takes_rows(a) || a.height * a.width >= kLeastPixels;
}

std::string hopper_wgrad_refusal(const ConvArguments& a, const Device& device) {
  const std::string common = hopper_refusal(a, device);
  if (!common.empty()) return common;
  if (takes_strides(a)) {
    const std::string strided = hopper_strided_refusal(a, device);
    if (!strided.empty()) return strided;
  }
  if (takes_upsampled(a)) {
    const std::string upsampled = hopper_upsampled_refusal(a, device);
    if (!upsampled.empty()) return upsampled;
  }
  if (a.num_groups > kHopperWgradMostGroups) {
    return "it has at most " + std::to_string(kHopperWgradMostGroups) + " groups in wgrad";
  }
  const UnitChoice unit = choose_unit(a);
  if (stages(a, device, unit) == 0) return "its stages do not fit into shared memory";
  // Which patches there are depends on whether dsample_bias is wanted; whether the form serves does not.
  ConvArguments without = a, with = a;
  without.dsample_bias = 0, with.dsample_bias = 1;
  const int64_t most_patches = std::max(patches(without), patches(with));
  // The line of all work is counted in 32 bits, and so are the rows of patches.
  const int64_t line = most_patches * unit.most_patch + kHopperUnitEnd * a.num_experts;
  if (line > std::numeric_limits<int>::max() / std::max<int64_t>(8, units_of_expert(a, unit))) {
    return "it takes less than 2^37 clocks in wgrad";
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
  if (by_boxes(a)) {
    for (size_t offset : {offsetof(ConvHopperWgradParams, even_odd), offsetof(ConvHopperWgradParams, odd_even),
                          offsetof(ConvHopperWgradParams, odd_odd)}) {
      products.tensor_maps.push_back(static_cast<unsigned>(offset));
    }
  }
  const int table = groups * static_cast<int>(sizeof(HopperWgradGroup));
  const unsigned slices = blocks_of({a.num_experts, units_of_expert(a, unit), kHopperReduceSlices}, a);
  const unsigned reducers = std::min(slices, static_cast<unsigned>(kHopperReduceBlocks * device.multiprocessors));
  std::vector<Launch> launches;
  if (takes_upsampled(a)) launches.push_back(launch_window_sums(a, device, p));
  launches.push_back(products);
  launches.push_back(launch_of(name + "reduce_" + type, reducers, kHopperReduceThreads, table, p, a));
  return launches;
}

size_t hopper_wgrad_workspace(const ConvArguments& a, const Device& device) {
  return a.dweight ? Workspace(a, device, choose_unit(a)).total() : 0;
}

}  // namespace tdc
