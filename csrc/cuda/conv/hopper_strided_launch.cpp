#include <algorithm>
#include <cstddef>
#include <utility>

#include "cuda/conv/hopper_launch.h"
#include "cuda/conv/hopper_strided_params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int kLeastStages = 3, kLeastPixels = 4;

struct TileChoice {
  const char* name;
  int64_t rows, columns;
  std::array<int, 3> products;  // columns of each
  int (*shared_bytes)(int stages, int num_groups);
  int64_t width, height;  // of the box

  int64_t samples() const { return rows / (width * height); }
};

template <class Tile>
TileChoice choice_of(const char* name) {
  return {name,
          Tile::kSamples,
          Tile::kColumns,
          {Tile::kHalf, Tile::kThreeQuarters, Tile::kColumns},
          hopper_rows_shared_bytes<Tile>,
          0,
          0};
}

int64_t result_channels(const ConvArguments& a, bool forward) { return forward ? a.out_channels : a.in_channels; }
int64_t planes(bool forward) { return forward ? 1 : kHopperPlanes; }

// Tiles of an image of y, or of the largest plane of dx, which is of the same size.
int64_t tiles_of_image(const ConvArguments& a, const TileChoice& tile, bool forward) {
  return ceil_div(a.out_height(), tile.height) * ceil_div(a.out_width(), tile.width) *
         ceil_div(result_channels(a, forward), tile.columns);
}

// Clocks of the busiest SM with even groups, and of all SMs, in 64 channels of the source. An SM multiplies 2048 pairs
// and reads 64 bytes of the L2 cache in a clock.
std::pair<int64_t, int64_t> clocks(const ConvArguments& a, const Device& device, bool forward, const TileChoice& tile) {
  const int64_t groups = std::max<int64_t>(1, std::min(a.num_groups, a.batch)), blocks = device.multiprocessors;
  const int64_t tiles = groups * ceil_div(ceil_div(a.batch, groups), tile.samples()) * tiles_of_image(a, tile, forward);
  const int64_t products = tile.rows * tile.columns * kHopperDepth / 2048;
  const int64_t of_tap = std::max(products, (tile.rows + tile.columns) * kHopperRow / 64);
  const int64_t all_taps = a.filter_height * a.filter_width;
  if (forward) return {ceil_div(tiles, blocks) * all_taps * of_tap, tiles * all_taps * of_tap};
  int64_t taps = 0, first = 0;  // of the first block, which takes every blocks-th tile; the plane's first tile
  const int64_t of_even = a.filter_height / 2, of_odd = (a.filter_height + 1) / 2;  // along an axis
  for (int64_t of_plane : {of_odd * of_odd, of_odd * of_even, of_even * of_odd, of_even * of_even}) {
    taps += (ceil_div(first + tiles, blocks) - ceil_div(first, blocks)) * of_plane;
    first += tiles;
  }
  return {taps * of_tap, tiles * all_taps * of_tap};
}

// The tiles, the one with the fewest clocks first; of equals the larger one, in the larger part of an image.
std::vector<TileChoice> tiles_by_clocks(const ConvArguments& a, const Device& device, bool forward) {
  std::vector<TileChoice> tiles;
  for (TileChoice tile : {choice_of<HopperRows256x128>("256x128"), choice_of<HopperRows128x128>("128x128"),
                          choice_of<HopperRows128x64>("128x64")}) {
    for (auto [width, height] : {std::array<int64_t, 2>{16, 16}, {16, 8}, {8, 16}, {8, 8}, {4, 4}}) {
      if (width * height > tile.rows) continue;
      tile.width = width, tile.height = height;
      tiles.push_back(tile);
    }
  }
  return by_clocks(std::move(tiles), [&](const TileChoice& tile) { return clocks(a, device, forward, tile); });
}

// As many stages as fit; 0 where too few do.
int stages(const TileChoice& tile, const ConvArguments& a, const Device& device) {
  return most_stages(kLeastStages, kHopperRowsMostStages, a, device, tile.shared_bytes);
}

int log2_of(int64_t power) {
  int log = 0;
  while ((int64_t{1} << log) < power) ++log;
  return log;
}

}  // namespace

bool takes_strides(const ConvArguments& a) {
  return a.filter_height == 3 && a.filter_width == 3 && a.stride_height == 2 && a.stride_width == 2 &&
         a.pad_height == 1 && a.pad_width == 1;
}

std::string hopper_strided_refusal(const ConvArguments& a, const Device& device) {
  if (a.x2_channels) return "its filters of stride 2 have one input";
  if (std::min(a.height, a.width) < kLeastPixels) return "its filters of stride 2 have images from 4x4 on";
  if (a.num_groups > kHopperMostGroups) return "it has at most " + std::to_string(kHopperMostGroups) + " groups";
  if (stages(choice_of<HopperRows256x128>(""), a, device) == 0) return "its stages do not fit into shared memory";
  return "";
}

std::vector<HopperChoice> hopper_strided_choices(const ConvArguments& a, const Device& device, bool forward) {
  const int64_t steps = ceil_div(forward ? a.in_channels : a.out_channels, kHopperDepth);
  std::vector<HopperChoice> choices;
  for (const TileChoice& tile : tiles_by_clocks(a, device, forward)) {
    const int64_t of_step = clocks(a, device, forward, tile).first;
    choices.push_back({std::string("strided_") + tile.name, steps * of_step, tile.products});
  }
  return choices;
}

std::vector<Launch> launch_hopper_strided(const ConvArguments& a, const Device& device, bool forward) {
  if (a.batch == 0) return {};
  using Params = ConvHopperStridedParams;
  const TileChoice tile = tiles_by_clocks(a, device, forward).front();
  const int64_t results = result_channels(a, forward);
  const TensorSizes loaded = {kHopperDepth, tile.width, tile.height, tile.samples()};
  const TensorSizes stored = {kHopperDepth, tile.width, 16 / tile.width, 1};
  const TensorSizes of_y = {a.out_channels, a.out_width(), a.out_height(), a.batch};
  Params p{};
  std::vector<unsigned> maps;
  const auto set = [&](TensorMap& map, const TensorMap& description) {
    map = description;
    maps.push_back(
        static_cast<unsigned>(reinterpret_cast<unsigned char*>(&map) - reinterpret_cast<unsigned char*>(&p)));
  };
  const auto set_planes = [&](HopperPlaneMaps& to, uintptr_t address, const TensorSizes& box) {
    int plane = 0;
    for (TensorMap* map : {&to.even_even, &to.even_odd, &to.odd_even, &to.odd_odd}) {
      set(*map, plane_of(address, a.in_channels, plane++, box, a));
    }
  };
  const int64_t taps = a.filter_height * a.filter_width;
  set(p.weight, tensor_map_of(a.weight, {a.in_channels, taps, a.out_channels, a.num_experts}, {64, 1, 64, 1}, a));
  if (forward) {
    set_planes(p.source, a.x, loaded);
    set(p.result.even_even, tensor_map_of(a.y, of_y, stored, a));
    if (a.residual) set(p.residual.even_even, tensor_map_of(a.residual, of_y, stored, a));
  } else {
    set(p.source.even_even, tensor_map_of(a.dy, of_y, loaded, a));
    set_planes(p.result, a.dx, stored);
    if (a.residual) set_planes(p.residual, a.residual, stored);
  }
  p.bias = pointer<const void>(a.bias);
  p.sample_bias = pointer<const void>(a.sample_bias);
  p.has_residual = a.residual != 0;
  std::sort(maps.begin(), maps.end());
  p.routing = routing_of(a);
  p.source_channels = static_cast<int>(forward ? a.in_channels : a.out_channels);
  p.result_channels = p.result_seam = static_cast<int>(results);
  p.rows_per_sample = 1;
  p.box_samples = static_cast<int>(tile.samples());
  p.box_height = static_cast<int>(tile.height);
  p.box_width = static_cast<int>(tile.width);
  p.box_width_log2 = log2_of(tile.width);
  p.box_pixels_log2 = log2_of(tile.width * tile.height);
  p.tiles_down = static_cast<int>(ceil_div(a.out_height(), tile.height));
  p.tiles_across = static_cast<int>(ceil_div(a.out_width(), tile.width));
  p.channel_tiles = static_cast<int>(ceil_div(results, tile.columns));
  p.filter = static_cast<int>(a.filter_height);
  p.stages = stages(tile, a, device);

  // The device counts the tiles; there are at most so many.
  const int64_t rows = std::min(a.batch, a.batch / tile.samples() + std::min(a.num_groups, a.batch));
  const unsigned most = blocks_of({rows, tiles_of_image(a, tile, forward), planes(forward)}, a);
  const std::string kernel =
      std::string("tdc_conv_hopper_strided_") + (forward ? "forward_" : "dgrad_") + storage_name(a) + "_" + tile.name;
  Launch launch = launch_of(kernel, std::min(most, static_cast<unsigned>(device.multiprocessors)), kHopperThreads,
                            tile.shared_bytes(p.stages, static_cast<int>(a.num_groups)), p, a);
  launch.tensor_maps = maps;
  return {launch};
}

}  // namespace tdc
