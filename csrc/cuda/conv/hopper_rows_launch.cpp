#include <algorithm>
#include <cstddef>
#include <utility>

#include "cuda/conv/hopper_launch.h"
#include "cuda/conv/hopper_model.h"
#include "cuda/conv/hopper_rows_params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int kLeastStages = 3;

struct TileChoice {
  const char *split, *name;
  int rows, columns, blocks;    // blocks of a cluster
  std::array<int, 3> products;  // columns of each
  int (*shared_bytes)(int stages, int num_groups);
};

template <class Tile>
TileChoice choice_of(const char* split, const char* name) {
  return {split,
          name,
          Tile::kSamples,
          Tile::kColumns,
          Tile::kSplit,
          {Tile::kHalf, Tile::kThreeQuarters, Tile::kColumns},
          hopper_rows_shared_bytes<Tile>};
}

bool filter_is(const ConvArguments& a, int64_t size, int64_t padding) {
  return a.filter_height == size && a.filter_width == size && a.pad_height == padding && a.pad_width == padding;
}

// Tiles along the channels of the result; none has channels of both inputs.
int64_t channel_tiles(const ConvArguments& a, const TileChoice& tile, bool forward) {
  return forward ? ceil_div(a.out_channels, tile.columns)
                 : ceil_div(a.x_channels(), tile.columns) + ceil_div(a.x2_channels, tile.columns);
}

int64_t clocks(const ConvArguments& a, const Device& device, bool forward, const TileChoice& tile) {
  const int64_t rows = even_samples(a) * a.height * a.width, rest = rows % tile.rows;
  const int64_t of_row = channel_tiles(a, tile, forward) * even_groups(a), taps = a.filter_height * a.filter_width;
  const int64_t steps =
      forward ? hopper_steps(taps, a.x_channels(), a.x2_channels) : hopper_steps(taps, a.out_channels, 0);
  const HopperTileCost cost{tile.rows, tile.columns, tile.rows * kHopperRow};
  return hopper_clocks(cost, {rows / tile.rows * of_row, rest ? of_row : 0, rest, steps}, device, tile.blocks);
}

// The tiles, the one that keeps the busiest SM for the fewest clocks first; of equals the larger, with the fewer
// blocks. Only where tiles leave SMs idle does a cluster gain.
std::vector<TileChoice> tiles_by_clocks(const ConvArguments& a, const Device& device, bool forward) {
  std::vector<TileChoice> tiles = {
      choice_of<HopperRows256x128>("", "256x128"), choice_of<HopperRows128x128>("", "128x128"),
      choice_of<HopperRows128x64>("", "128x64"), choice_of<HopperRowsSplit2_128x64>("split2_", "128x64"),
      choice_of<HopperRowsSplit4_128x64>("split4_", "128x64")};
  return by_clocks(std::move(tiles), [&](const TileChoice& tile) { return clocks(a, device, forward, tile); });
}

// As many stages as fit; 0 where too few do.
int stages(const TileChoice& tile, const ConvArguments& a, const Device& device) {
  return most_stages(kLeastStages, kHopperRowsMostStages, a, device, tile.shared_bytes);
}

}  // namespace

bool takes_rows(const ConvArguments& a) {
  if (a.stride_height != 1 || a.stride_width != 1 || a.upsample != 1) return false;
  // Whole images, moved by a tap, fill the 64 rows of a product.
  return filter_is(a, 1, 0) ||
         (filter_is(a, 3, 1) && std::min(a.height, a.width) < 8 && 64 % (a.height * a.width) == 0);
}

bool may_take_rows(const ConvArguments& a) {
  return a.height == 8 && a.width == 8 && filter_is(a, 3, 1) && a.stride_height == 1 && a.stride_width == 1 &&
         a.upsample == 1;
}

std::string hopper_rows_refusal(const ConvArguments& a, const Device& device) {
  if (a.num_groups > kHopperMostGroups) return "it has at most " + std::to_string(kHopperMostGroups) + " groups";
  if (stages(choice_of<HopperRows256x128>("", ""), a, device) == 0) return "its stages do not fit into shared memory";
  return "";
}

std::vector<HopperChoice> hopper_rows_choices(const ConvArguments& a, const Device& device, bool forward) {
  std::vector<HopperChoice> choices;
  for (const TileChoice& tile : tiles_by_clocks(a, device, forward)) {
    choices.push_back({std::string("rows_") + tile.split + tile.name, clocks(a, device, forward, tile), tile.products});
  }
  return choices;
}

std::vector<Launch> launch_hopper_rows(const ConvArguments& a, const Device& device, bool forward) {
  if (a.batch == 0) return {};
  using Params = ConvHopperRowsParams;
  const TileChoice tile = tiles_by_clocks(a, device, forward).front();
  const int64_t pixels = a.height * a.width, rows = a.batch * pixels;
  Params p{};
  std::vector<unsigned> maps;
  const auto describe_map = [&](size_t offset, TensorMap& map, uintptr_t address, int64_t channels, int64_t box_rows) {
    map = tensor_map_of(address, {channels, rows, 1, 1}, {64, box_rows, 1, 1}, a);
    maps.push_back(static_cast<unsigned>(offset));
  };
  const int64_t taps = a.filter_height * a.filter_width;
  const auto describe_source = [&](size_t offset, TensorMap& map, uintptr_t address, int64_t channels) {
    if (taps == 1) return describe_map(offset, map, address, channels, tile.rows);
    map =
        tensor_map_of(address, {channels, a.width, a.height, a.batch}, {64, a.width, a.height, tile.rows / pixels}, a);
    maps.push_back(static_cast<unsigned>(offset));
  };
#define TDC_SOURCE(field, ...) describe_source(offsetof(Params, field), p.field, __VA_ARGS__)
#define TDC_MAP(field, ...) describe_map(offsetof(Params, field), p.field, __VA_ARGS__)
  const auto describe_result = [&](uintptr_t address, int64_t channels) {
    TDC_MAP(result, address, channels, 16);
    TDC_MAP(result_row, address, channels, 1);
  };
  p.weight = tensor_map_of(a.weight, {a.in_channels, taps, a.out_channels, a.num_experts}, {64, 1, 64, 1}, a);
  maps.push_back(offsetof(Params, weight));
  if (forward) {
    TDC_SOURCE(source, a.x, a.x_channels());
    if (a.x2_channels) TDC_SOURCE(source2, a.x2, a.x2_channels);
    describe_result(a.y, a.out_channels);
    if (a.residual) TDC_MAP(residual, a.residual, a.out_channels, 16);
    p.bias = pointer<const void>(a.bias);
    p.sample_bias = pointer<const void>(a.sample_bias);
    p.has_residual = a.residual != 0;
  } else {
    TDC_SOURCE(source, a.dy, a.out_channels);
    describe_result(a.dx, a.x_channels());
    if (a.x2_channels) {
      TDC_MAP(result2, a.dx2, a.x2_channels, 16);
      TDC_MAP(result2_row, a.dx2, a.x2_channels, 1);
    }
  }
#undef TDC_MAP
#undef TDC_SOURCE
  std::sort(maps.begin(), maps.end());
  p.routing = routing_of(a);
  const int64_t seam = a.x_channels();
  p.source_channels = static_cast<int>(forward ? a.in_channels : a.out_channels);
  p.result_channels = static_cast<int>(forward ? a.out_channels : a.in_channels);
  p.source_seam = static_cast<int>(forward ? seam : a.out_channels);
  p.result_seam = static_cast<int>(forward ? a.out_channels : seam);
  p.rows_per_sample = static_cast<int>(pixels);
  p.by_rows = fast_divisor(pixels);
  p.tiles_down = p.tiles_across = 1;
  p.channel_tiles = static_cast<int>(channel_tiles(a, tile, forward));
  p.taps = static_cast<int>(taps);
  p.stages = stages(tile, a, device);

  // The device counts the tiles; there are at most so many.
  const int64_t most_rows = std::min(rows, rows / tile.rows + std::min(a.num_groups, a.batch));
  const unsigned most = blocks_of({most_rows, p.channel_tiles}, a);
  const int64_t clusters = std::min<int64_t>(most, hopper_clusters(device, tile.blocks));
  const std::string kernel = std::string("tdc_conv_hopper_rows_") + tile.split + (forward ? "forward_" : "dgrad_") +
                             storage_name(a) + "_" + tile.name;
  Launch launch = launch_of(kernel, static_cast<unsigned>(clusters), kHopperThreads,
                            tile.shared_bytes(p.stages, static_cast<int>(a.num_groups)), p, a);
  launch.grid[1] = static_cast<unsigned>(tile.blocks);
  launch.tensor_maps = maps;
  return {launch};
}

}  // namespace tdc
