#include "cuda/conv/hopper_launch.h"

#include <algorithm>
#include <cstddef>

#include "cuda/conv/hopper_params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int kLeastChannels = kHopperDepth, kLeastPixels = 8;
constexpr int kLeastWeightStages = 2;

struct TileChoice {
  const char* name;
  int down, across, samples, columns, box_height, box_width;
  int (*shared_bytes)(int weight_stages, int num_groups);
};

template <class Tile>
TileChoice choice_of(const char* name) {
  return {name,           Tile::kDown,      Tile::kAcross,   Tile::kSamples,
          Tile::kColumns, Tile::kBoxHeight, Tile::kBoxWidth, hopper_shared_bytes<Tile>};
}

int64_t source_channels(const ConvArguments& a, bool forward) { return forward ? a.in_channels : a.out_channels; }
int64_t result_channels(const ConvArguments& a, bool forward) { return forward ? a.out_channels : a.in_channels; }

// The tile that computes the fewest pixels and channels outside of the result; of equals, the one that loads fewer
// pixels around itself. 128 columns go before 192, and 64 take more pixels instead.
TileChoice choose_tile(const ConvArguments& a, bool forward) {
  const int64_t small = ceil_div(a.height, 8) * ceil_div(a.width, 8) * 64;
  const int64_t large = ceil_div(a.height, 16) * ceil_div(a.width, 16) * 256;
  if (small < large) return choice_of<HopperTile8x8>("8x8x4x128");
  const int64_t channels = result_channels(a, forward);
  const int64_t tall = ceil_div(a.height, 32) * ceil_div(a.width, 16) * 512;
  if (channels <= 64 && tall <= large) return choice_of<HopperTile32x16>("32x16x64");
  return ceil_div(channels, 192) * 192 < ceil_div(channels, 128) * 128 ? choice_of<HopperTile16x16Wide>("16x16x192")
                                                                       : choice_of<HopperTile16x16>("16x16x128");
}

// As many stages of weights as fit; 0 where too few do.
int weight_stages(const TileChoice& tile, const ConvArguments& a, const Device& device) {
  int stages = kHopperMostWeightStages;
  while (stages > 0 && tile.shared_bytes(stages, static_cast<int>(a.num_groups)) > device.shared_limit) --stages;
  return stages < kLeastWeightStages ? 0 : stages;
}

std::vector<Launch> launch_images(const ConvArguments& a, const Device& device, bool forward) {
  if (a.batch == 0) return {};
  const TileChoice tile = choose_tile(a, forward);
  const int64_t sources = source_channels(a, forward), results = result_channels(a, forward);
  const TensorSizes of_result = {results, a.width, a.height, a.batch}, stored = {64, 8, 2, 1};
  ConvHopperParams p{};
  p.source = tensor_map_of(forward ? a.x : a.dy, {sources, a.width, a.height, a.batch},
                           {kHopperDepth, tile.box_width, tile.box_height, tile.samples}, a);
  p.weight = tensor_map_of(a.weight, {a.in_channels, kHopperTaps, a.out_channels, a.num_experts}, {64, 1, 64, 1}, a);
  p.result = tensor_map_of(forward ? a.y : a.dx, of_result, stored, a);
  if (forward) {
    p.bias = pointer<const void>(a.bias);
    p.sample_bias = pointer<const void>(a.sample_bias);
    p.has_residual = a.residual != 0;
    if (p.has_residual) p.residual = tensor_map_of(a.residual, of_result, stored, a);
  }
  p.routing = routing_of(a);
  p.source_channels = static_cast<int>(sources);
  p.result_channels = p.result_seam = static_cast<int>(results);
  p.rows_per_sample = 1;
  p.tiles_down = static_cast<int>(ceil_div(a.height, 8 * tile.down));
  p.tiles_across = static_cast<int>(ceil_div(a.width, 8 * tile.across));
  p.channel_tiles = static_cast<int>(ceil_div(results, tile.columns));
  p.weight_stages = weight_stages(tile, a, device);

  // The device counts the tiles; there are at most so many.
  const int64_t rows = std::min(a.batch, a.batch / tile.samples + std::min(a.num_groups, a.batch));
  const unsigned most = blocks_of({rows, p.tiles_down, p.tiles_across, p.channel_tiles}, a);
  const unsigned blocks = std::min(most, static_cast<unsigned>(device.multiprocessors));
  const std::string kernel =
      std::string(forward ? "tdc_conv_hopper_forward_" : "tdc_conv_hopper_dgrad_") + storage_name(a) + "_" + tile.name;
  Launch launch = launch_of(kernel, blocks, kHopperThreads,
                            tile.shared_bytes(p.weight_stages, static_cast<int>(a.num_groups)), p, a);
  launch.tensor_maps = {offsetof(ConvHopperParams, source), offsetof(ConvHopperParams, weight),
                        offsetof(ConvHopperParams, result)};
  if (p.has_residual) launch.tensor_maps.push_back(offsetof(ConvHopperParams, residual));
  return {launch};
}

}  // namespace

std::string hopper_refusal(const ConvArguments& a, const Device& device) {
  if (device.arch != 90) {
    return "it needs compute capability 9.0, not " + std::to_string(device.arch / 10) + "." +
           std::to_string(device.arch % 10);
  }
  if (a.dtype == 0) return "it has bf16 and fp16, not fp32";
  if (!takes_rows(a)) {
    if (a.filter_height != 3 || a.filter_width != 3 || a.stride_height != 1 || a.stride_width != 1 ||
        a.pad_height != 1 || a.pad_width != 1) {
      return "it has 3x3 filters with padding 1 and 1x1 filters with padding 0, both with stride 1";
    }
    if (a.upsample > 1) return "its input is not upsampled";
    if (std::min(a.height, a.width) < kLeastPixels) {
      return "its 3x3 filters have images from 8x8 on, or whose number of pixels divides 64";
    }
    if (a.x2_channels) return "its 3x3 filters have one input, but on small images";
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
  if (takes_rows(a)) return hopper_rows_refusal(a, device);
  if (a.num_groups > kHopperMostGroups) return "it has at most " + std::to_string(kHopperMostGroups) + " groups";
  if (weight_stages(choose_tile(a, forward), a, device) == 0) return "its stages do not fit into shared memory";
  return "";
}

std::vector<Launch> launch_hopper_forward(const ConvArguments& arguments, const Device& device) {
  return takes_rows(arguments) ? launch_hopper_rows(arguments, device, true) : launch_images(arguments, device, true);
}

std::vector<Launch> launch_hopper_dgrad(const ConvArguments& arguments, const Device& device) {
  return takes_rows(arguments) ? launch_hopper_rows(arguments, device, false) : launch_images(arguments, device, false);
}

}  // namespace tdc
