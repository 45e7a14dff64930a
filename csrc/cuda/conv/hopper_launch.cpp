#include "cuda/conv/hopper_launch.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "cuda/conv/hopper_model.h"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int kLeastChannels = kHopperDepth, kLeastPixels = 8;
constexpr int kLeastWeightStages = 2;

struct TileChoice {
  const char* name;
  int down, across, samples, columns, box_height, box_width, source_bytes;
  std::array<int, 3> products;  // columns of each
  int (*shared_bytes)(int weight_stages, int num_groups);
};

template <class Tile>
TileChoice choice_of(const char* name) {
  return {name,
          Tile::kDown,
          Tile::kAcross,
          Tile::kSamples,
          Tile::kColumns,
          Tile::kBoxHeight,
          Tile::kBoxWidth,
          Tile::kSourceBytes,
          {Tile::kHalf, Tile::kThreeQuarters, Tile::kColumns},
          hopper_shared_bytes<Tile>};
}

// Tensors of a side of the convolution: its input is x and x2, or their gradients.
struct Side {
  uintptr_t first, second;
  int64_t channels, seam;  // of both; of the first

  int64_t of_second() const { return channels - seam; }
  // No tile has channels of both.
  int64_t tiles(int64_t columns) const { return ceil_div(seam, columns) + ceil_div(of_second(), columns); }
};

Side source_of(const ConvArguments& a, bool forward) {
  return forward ? Side{a.x, a.x2, a.in_channels, a.x_channels()} : Side{a.dy, 0, a.out_channels, a.out_channels};
}
Side result_of(const ConvArguments& a, bool forward) {
  return forward ? Side{a.y, 0, a.out_channels, a.out_channels} : Side{a.dx, a.dx2, a.in_channels, a.x_channels()};
}

// Clocks of the busiest SM. A source is loaded once for all taps.
int64_t clocks(const ConvArguments& a, const Device& device, bool forward, const TileChoice& tile) {
  const Side source = source_of(a, forward), result = result_of(a, forward);
  const int64_t pixels = 64 * tile.down * tile.across, samples = even_samples(a), rest = samples % tile.samples;
  const int64_t of_row = ceil_div(a.height, 8 * tile.down) * ceil_div(a.width, 8 * tile.across) *
                         result.tiles(tile.columns) * even_groups(a);
  const int64_t columns = hopper_mean_columns(tile.products, result.seam, result.of_second());
  const HopperTileCost cost{tile.samples * pixels, columns, tile.source_bytes / kHopperTaps};
  const HopperTiles tiles{samples / tile.samples * of_row, rest ? of_row : 0, rest * pixels,
                          hopper_steps(kHopperTaps, source.seam, source.of_second())};
  return hopper_clocks(cost, tiles, device, 1);
}

// Of the large tiles the one that computes the fewest pixels and channels outside of the result; of equals, the one
// that loads fewer pixels around itself. Up to 64 columns take more pixels instead. Of 192 and 128 columns that fit as
// well the faster one, or 192: of 384 channels they leave 0.75 to multiply where 0.75 are live, 128 leave 0.83.
TileChoice choose_large_tile(const ConvArguments& a, const Device& device, bool forward) {
  const int64_t small = ceil_div(a.height, 8) * ceil_div(a.width, 8) * 64;
  const int64_t large = ceil_div(a.height, 16) * ceil_div(a.width, 16) * 256;
  if (small < large) return choice_of<HopperTile8x8>("8x8x4x128");
  const Side result = result_of(a, forward);
  const int64_t tall = ceil_div(a.height, 32) * ceil_div(a.width, 16) * 512;
  if (std::max(result.seam, result.of_second()) <= 64 && tall <= large) return choice_of<HopperTile32x16>("32x16x64");
  const TileChoice wide = choice_of<HopperTile16x16Wide>("16x16x192"), narrow = choice_of<HopperTile16x16>("16x16x128");
  const int64_t empty = result.tiles(192) * 192 - result.tiles(128) * 128;
  if (empty != 0) return empty < 0 ? wide : narrow;
  return clocks(a, device, forward, wide) <= clocks(a, device, forward, narrow) ? wide : narrow;
}

// A large tile, or a quarter of one where the large ones would leave SMs idle: of two samples, or of one, which groups
// of odd or single samples fill. The one with the fewest clocks; of equals the first of these.
std::vector<TileChoice> tiles_by_clocks(const ConvArguments& a, const Device& device, bool forward) {
  std::vector<TileChoice> tiles = {choose_large_tile(a, device, forward), choice_of<HopperTile8x8Quarter>("8x8x2x64"),
                                   choice_of<HopperTile16x8Quarter>("16x8x64")};
  return by_clocks(std::move(tiles), [&](const TileChoice& tile) { return clocks(a, device, forward, tile); });
}
TileChoice choose_tile(const ConvArguments& a, const Device& device, bool forward) {
  return tiles_by_clocks(a, device, forward).front();
}

// The form of rows reads each pixel once per tap: it must be faster by a tenth.
bool runs_as_rows(const ConvArguments& a, const Device& device, bool forward) {
  if (!may_take_rows(a)) return takes_rows(a);
  const int64_t as_images = clocks(a, device, forward, choose_tile(a, device, forward));
  return hopper_rows_choices(a, device, forward).front().clocks < as_images / 10 * 9;
}

// As many stages of weights as fit; 0 where too few do.
int weight_stages(const TileChoice& tile, const ConvArguments& a, const Device& device) {
  return most_stages(kLeastWeightStages, kHopperMostWeightStages, a, device, tile.shared_bytes);
}

std::vector<Launch> launch_images(const ConvArguments& a, const Device& device, bool forward) {
  if (a.batch == 0) return {};
  const TileChoice tile = choose_tile(a, device, forward);
  const Side source = source_of(a, forward), result = result_of(a, forward);
  ConvHopperParams p{};
  std::vector<unsigned> maps;
  const auto describe = [&](TensorMap& map, uintptr_t address, int64_t channels, const TensorSizes& box) {
    if (channels == 0) return;
    map = tensor_map_of(address, {channels, a.width, a.height, a.batch}, box, a);
    maps.push_back(static_cast<unsigned>(reinterpret_cast<char*>(&map) - reinterpret_cast<char*>(&p)));
  };
  const TensorSizes loaded = {kHopperDepth, tile.box_width, tile.box_height, tile.samples}, stored = {64, 8, 2, 1};
  describe(p.source, source.first, source.seam, loaded);
  describe(p.source2, source.second, source.of_second(), loaded);
  p.weight = tensor_map_of(a.weight, {a.in_channels, kHopperTaps, a.out_channels, a.num_experts}, {64, 1, 64, 1}, a);
  maps.push_back(offsetof(ConvHopperParams, weight));
  describe(p.result, result.first, result.seam, stored);
  describe(p.result2, result.second, result.of_second(), stored);
  if (forward) {
    p.bias = pointer<const void>(a.bias);
    p.sample_bias = pointer<const void>(a.sample_bias);
    p.has_residual = a.residual != 0;
    if (p.has_residual) describe(p.residual, a.residual, a.out_channels, stored);
  }
  p.routing = routing_of(a);
  p.source_channels = static_cast<int>(source.channels);
  p.source_seam = static_cast<int>(source.seam);
  p.result_channels = static_cast<int>(result.channels);
  p.result_seam = static_cast<int>(result.seam);
  p.rows_per_sample = 1;
  p.tiles_down = static_cast<int>(ceil_div(a.height, 8 * tile.down));
  p.tiles_across = static_cast<int>(ceil_div(a.width, 8 * tile.across));
  p.channel_tiles = static_cast<int>(result.tiles(tile.columns));
  p.weight_stages = weight_stages(tile, a, device);

  // The device counts the tiles; there are at most so many.
  const int64_t rows = std::min(a.batch, a.batch / tile.samples + std::min(a.num_groups, a.batch));
  const unsigned most = blocks_of({rows, p.tiles_down, p.tiles_across, p.channel_tiles}, a);
  const unsigned blocks = std::min(most, static_cast<unsigned>(device.multiprocessors));
  const std::string kernel =
      std::string(forward ? "tdc_conv_hopper_forward_" : "tdc_conv_hopper_dgrad_") + storage_name(a) + "_" + tile.name;
  Launch launch = launch_of(kernel, blocks, kHopperThreads,
                            tile.shared_bytes(p.weight_stages, static_cast<int>(a.num_groups)), p, a);
  launch.tensor_maps = maps;
  return {launch};
}

std::vector<Launch> launch_hopper(const ConvArguments& a, const Device& device, bool forward) {
  if (runs_as_rows(a, device, forward)) return launch_hopper_rows(a, device, forward);
  if (takes_upsampled(a)) return launch_hopper_upsampled(a, device, forward);
  return takes_strides(a) ? launch_hopper_strided(a, device, forward) : launch_images(a, device, forward);
}

}  // namespace

std::string hopper_refusal(const ConvArguments& a, const Device& device) {
  if (device.arch != 90) {
    return "it needs compute capability 9.0, not " + std::to_string(device.arch / 10) + "." +
           std::to_string(device.arch % 10);
  }
  if (a.dtype == 0) return "it has bf16 and fp16, not fp32";
  if (std::min(a.height, a.width) < 1) return "it needs images of at least one pixel";
  if (a.upsample > 1 && !takes_upsampled(a)) return "it upsamples one input of 3x3 filters with padding 1 and stride 1";
  if (!takes_rows(a) && !takes_strides(a) && !takes_upsampled(a)) {
    if (a.filter_height != 3 || a.filter_width != 3 || a.stride_height != 1 || a.stride_width != 1 ||
        a.pad_height != 1 || a.pad_width != 1) {
      return "it has 3x3 filters with padding 1 and stride 1 or 2, and 1x1 filters with padding 0 and stride 1";
    }
    if (std::min(a.height, a.width) < kLeastPixels) {
      return "its 3x3 filters have images from 8x8 on, or whose number of pixels divides 64";
    }
  }
  if (std::min(a.in_channels, a.out_channels) < 8) return "it leaves image channels to the portable form";
  if (std::min(a.in_channels, a.out_channels) < kLeastChannels || a.x_channels() % 8 || a.x2_channels % 8 ||
      a.out_channels % 8) {
    return "it has channels from 64 on, in multiples of 8";
  }
  for (uintptr_t address :
       {a.x, a.x2, a.weight, a.bias, a.sample_bias, a.residual, a.y, a.dy, a.dx, a.dx2, a.dweight}) {
    if (address % 16) return "it needs addresses that are multiples of 16";
  }
  return "";
}

std::string hopper_refusal(const ConvArguments& a, const Device& device, bool forward) {
  const std::string common = hopper_refusal(a, device);
  if (!common.empty()) return common;
  if (runs_as_rows(a, device, forward)) return hopper_rows_refusal(a, device);
  if (takes_upsampled(a)) return hopper_upsampled_refusal(a, device);
  if (takes_strides(a)) return hopper_strided_refusal(a, device);
  if (a.num_groups > kHopperMostGroups) return "it has at most " + std::to_string(kHopperMostGroups) + " groups";
  if (weight_stages(choose_tile(a, device, forward), a, device) == 0) return "its stages do not fit into shared memory";
  return "";
}

std::vector<HopperChoice> hopper_choices(const ConvArguments& a, const Device& device, bool forward) {
  check(a);
  const std::string refusal = hopper_refusal(a, device, forward);
  require(refusal.empty(), refusal.c_str(), a);
  if (takes_upsampled(a)) return hopper_strided_choices(merged_convolution(a), device, !forward);
  if (takes_strides(a)) return hopper_strided_choices(a, device, forward);
  if (takes_rows(a)) return hopper_rows_choices(a, device, forward);
  std::vector<HopperChoice> choices;
  for (const TileChoice& tile : tiles_by_clocks(a, device, forward)) {
    choices.push_back({tile.name, clocks(a, device, forward, tile), tile.products});
  }
  if (!may_take_rows(a)) return choices;
  const std::vector<HopperChoice> rows = hopper_rows_choices(a, device, forward);
  choices.insert(runs_as_rows(a, device, forward) ? choices.begin() : choices.end(), rows.begin(), rows.end());
  return choices;
}

std::vector<Launch> launch_hopper_forward(const ConvArguments& arguments, const Device& device) {
  return launch_hopper(arguments, device, true);
}

std::vector<Launch> launch_hopper_dgrad(const ConvArguments& arguments, const Device& device) {
  return launch_hopper(arguments, device, false);
}

}  // namespace tdc
