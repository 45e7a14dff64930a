#include "cuda/conv/launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/conv/few_launch.h"
#include "cuda/conv/hopper_launch.h"
#include "cuda/conv/params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int64_t kMostSamplesPerTile = 256;  // of the tile table

// How a convolution is computed.
enum class ConvForm { kMmaSync, kHopper, kFew };

void require_architecture(const Device& device) {
  if (device.arch >= 80) return;
  throw std::invalid_argument("routed convolution: the GPU has compute capability " + std::to_string(device.arch / 10) +
                              "." + std::to_string(device.arch % 10) + "; the kernels need 8.0 or newer");
}

// The form of few channels where it serves, the Hopper form where it is asked for and serves, mma.sync elsewhere.
ConvForm conv_form(const ConvArguments& a, const Device& device, bool forward) {
  check(a);
  require_architecture(device);
  const ConvDirection direction = forward ? ConvDirection::kForward : ConvDirection::kDgrad;
  if (few_refusal(a, device, direction).empty()) return ConvForm::kFew;
  return a.hopper && hopper_refusal(a, device, forward).empty() ? ConvForm::kHopper : ConvForm::kMmaSync;
}

// Tiles.

struct TileChoice {
  const char* name;
  int rows, columns, threads, shared_bytes;
};

template <class Tile>
TileChoice choice_of(const char* name, const ConvArguments& a) {
  return {name, Tile::kRows, Tile::kColumns, Tile::kThreads, conv_shared_bytes<Tile>(element_bytes(a))};
}

// The larger tile where it fits and there are blocks for every SM; `tiles` counts the blocks of a tile size. Problems
// with partial chunks use the smaller tile.
template <class CountTiles>
TileChoice choose_tile(const ConvArguments& a, const Device& device, bool whole, CountTiles&& tiles) {
  const TileChoice large = choice_of<Tile128>("128x128", a), small = choice_of<Tile64>("64x64", a);
  if (!whole) return choice_of<Tile64>("64x64_any", a);
  return large.shared_bytes <= device.shared_limit && tiles(large) >= device.multiprocessors ? large : small;
}

// Forward and dgrad.

// Tiles of so many columns along the input channels, where none has channels of both inputs.
int64_t input_tiles(const ConvArguments& a, int64_t columns) {
  return ceil_div(a.x_channels(), columns) + ceil_div(a.x2_channels, columns);
}
// Of the larger input.
int64_t most_channels(const ConvArguments& a) { return std::max(a.x_channels(), a.x2_channels); }

// How the pixels of a batch are divided into tiles.
struct PixelTiles {
  int64_t samples;  // per row of the tile table, at most
  int64_t per_row;  // blocks that share the pixels of such a row
  int64_t rows;     // of that level of the table

  PixelTiles(const ConvArguments& a, int64_t pixels, int64_t tile_rows)
      : samples(1), per_row(ceil_div(pixels, tile_rows)) {
    while (samples < kMostSamplesPerTile && 2 * samples * pixels <= tile_rows) samples *= 2;
    rows = level_rows(a, samples);
  }

  static int64_t level_rows(const ConvArguments& a, int64_t samples) {
    return std::min(a.batch, a.batch / samples + std::min(a.num_groups, a.batch));
  }
  int64_t first_row(const ConvArguments& a) const {
    int64_t before = 0;
    for (int64_t level = 1; level < samples; level *= 2) before += level_rows(a, level);
    return before;
  }
};

std::vector<Launch> launch_images(const ConvArguments& a, const Device& device, bool forward) {
  require(forward || a.upsample == 1 || (a.stride_height == 1 && a.stride_width == 1),
          "the gradient of an upsampled image takes stride 1", a);
  if (a.batch == 0) return {};
  ConvImageParams p{};
  p.source = pointer<const void>(forward ? a.x : a.dy);
  p.source2 = pointer<const void>(forward ? a.x2 : 0);
  p.result = pointer<void>(forward ? a.y : a.dx);
  p.result2 = pointer<void>(forward ? 0 : a.dx2);
  p.weight = pointer<const void>(a.weight);
  if (forward) {
    p.bias = pointer<const void>(a.bias);
    p.sample_bias = pointer<const void>(a.sample_bias);
    p.residual = pointer<const void>(a.residual);
  }
  p.routing = routing_of(a);
  p.geometry = geometry_of(a);

  // dgrad computes the pixels of each parity as a separate image; the first is the largest.
  const int64_t images = forward ? 1 : a.stride_height * a.stride_width;
  const int64_t pixels = forward ? a.out_height() * a.out_width()
                                 : ceil_div(a.height, a.stride_height) * ceil_div(a.width, a.stride_width);
  const auto channel_tiles = [&](int64_t columns) {
    return forward ? ceil_div(a.out_channels, columns) : input_tiles(a, columns);
  };
  const bool whole =
      (forward ? whole_inputs(a.x, a.x2, a) : whole_chunks(a.out_channels, {a.dy}, a)) && whole_inputs(a.weight, 0, a);
  const TileChoice tile = choose_tile(a, device, whole, [&](const TileChoice& t) {
    const PixelTiles tiles(a, pixels, t.rows);
    const int64_t channels = forward ? a.out_channels : most_channels(a);
    return channels <= t.columns / 2 ? 0 : tiles.rows * tiles.per_row * images * channel_tiles(t.columns);
  });
  const PixelTiles tiles(a, pixels, tile.rows);
  p.tiles = pointer<const int>(a.tiles) + 3 * tiles.first_row(a);
  p.pixel_tiles = static_cast<int>(tiles.per_row);
  p.channel_tiles = static_cast<int>(channel_tiles(tile.columns));
  p.vector_result = forward ? whole_chunks(a.out_channels, {a.y, a.bias, a.sample_bias, a.residual}, a)
                            : whole_inputs(a.dx, a.dx2, a);
  const std::string kernel =
      std::string(forward ? "tdc_conv_forward_" : "tdc_conv_dgrad_") + product_name(a) + "_" + tile.name;
  const unsigned blocks = blocks_of({tiles.rows, tiles.per_row, images, p.channel_tiles}, a);
  return {launch_of(kernel, blocks, tile.threads, tile.shared_bytes, p, a)};
}

// dgrad of an upsampled image with merged taps (merge.cuh).

// Not as tf32, which would round the sums of numbers that need no rounding.
bool merges_taps(const ConvArguments& a) {
  return a.dtype != 0 && a.upsample == 2 && a.x2_channels == 0 && a.batch > 0 && a.stride_height == 1 &&
         a.stride_width == 1 && a.pad_height < a.filter_height && a.pad_width < a.filter_width;
}

std::vector<Launch> launch_merged_dgrad(const ConvArguments& a, const Device& device) {
  return {launch_merge_taps(a, "tdc_conv_merge_taps_"), launch_images(merged_convolution(a), device, true).front()};
}

// The Hopper form computes upsampled images on merged taps alone.
bool has_workspace(const ConvArguments& a) { return a.upsample == 1 || a.workspace; }

// Of either form.
size_t merged_bytes(const ConvArguments& a) {
  return a.num_experts * a.out_channels * (a.filter_height + 1) * (a.filter_width + 1) * a.in_channels *
         element_bytes(a);
}

// wgrad.

struct WgradTiling {
  bool whole;
  TileChoice tile;
  int64_t out_tiles, in_tiles, splits;
};

int64_t taps_of(const ConvArguments& a) { return a.filter_height * a.filter_width; }
int64_t weight_elements(const ConvArguments& a) { return a.num_experts * a.out_channels * taps_of(a) * a.in_channels; }

// Enough splits to give every SM two blocks, but with at least eight steps per split on average.
int64_t choose_splits(const ConvArguments& a, const Device& device, int64_t blocks) {
  constexpr int64_t kBlocksPerMultiprocessor = 2, kLeastSteps = 8, kMostSplits = 32;
  const int64_t steps = ceil_div(a.batch * a.out_height() * a.out_width(), kConvDepth);
  const int64_t experts = std::min({a.num_experts, a.num_groups, std::max<int64_t>(a.batch, 1)});
  const int64_t wanted = kBlocksPerMultiprocessor * device.multiprocessors / blocks;
  return std::max<int64_t>(1, std::min({wanted, steps / (experts * kLeastSteps), kMostSplits}));
}

WgradTiling tile_wgrad(const ConvArguments& a, const Device& device) {
  WgradTiling tiling;
  tiling.whole = whole_inputs(a.x, a.x2, a) && whole_chunks(a.out_channels, {a.dy}, a);
  const int64_t per_tile = a.num_experts * taps_of(a);
  // Splits fill the GPU, so the larger tile is right unless it is larger than the weight.
  tiling.tile = choose_tile(a, device, tiling.whole, [&](const TileChoice& t) {
    return std::min(a.out_channels, most_channels(a)) > t.rows / 2 ? device.multiprocessors : 0;
  });
  tiling.out_tiles = ceil_div(a.out_channels, tiling.tile.rows);
  tiling.in_tiles = input_tiles(a, tiling.tile.columns);
  tiling.splits = choose_splits(a, device, per_tile * tiling.out_tiles * tiling.in_tiles);
  return tiling;
}

ConvForm wgrad_form(const ConvArguments& a, const Device& device) {
  if (a.batch > 0 && few_refusal(a, device, ConvDirection::kWgrad).empty()) return ConvForm::kFew;
  return a.hopper && a.batch > 0 && hopper_wgrad_refusal(a, device).empty() ? ConvForm::kHopper : ConvForm::kMmaSync;
}

// Whether the launches of dweight have all sums of biases that are wanted.
bool has_biases_with_weight(const ConvArguments& a, const Device& device) {
  return wgrad_form(a, device) == ConvForm::kHopper ? hopper_sums_biases(a) : sums_bias_with_weight(a);
}

size_t partial_bytes(const ConvArguments& a, const Device& device) {
  const ConvForm form = wgrad_form(a, device);
  if (form == ConvForm::kHopper) return hopper_wgrad_workspace(a, device);
  if (form == ConvForm::kFew) return a.dweight ? few_wgrad_workspace(a, device) : 0;
  const WgradTiling tiling = tile_wgrad(a, device);
  return a.dweight && tiling.splits > 1 ? static_cast<size_t>(tiling.splits * ceil_div(weight_elements(a), 4) * 16) : 0;
}

size_t bias_bytes(const ConvArguments& a, const Device& device) {
  int64_t rows = a.dbias ? a.batch : 0;  // of C_out sums
  if (has_biases_with_weight(a, device)) {
    if (wgrad_form(a, device) != ConvForm::kMmaSync) return 0;  // among its partials
    const int64_t splits = tile_wgrad(a, device).splits;
    rows = splits > 1 ? splits * a.num_experts : 0;
  }
  return static_cast<size_t>(rows * a.out_channels) * sizeof(float);
}

void add_dweight(const ConvArguments& a, const Device& device, std::vector<Launch>& launches) {
  const WgradTiling tiling = tile_wgrad(a, device);
  ConvWgradParams p{};
  p.x = pointer<const void>(a.x);
  p.x2 = pointer<const void>(a.x2);
  p.dy = pointer<const void>(a.dy);
  p.dweight = pointer<void>(a.dweight);
  p.partials = pointer<float>(a.workspace);
  p.routing = routing_of(a);
  p.geometry = geometry_of(a);
  p.by_pixels = fast_divisor(a.out_height() * a.out_width());
  p.by_width = fast_divisor(a.out_width());
  p.splits = static_cast<int>(tiling.splits);
  p.out_tiles = static_cast<int>(tiling.out_tiles);
  p.in_tiles = static_cast<int>(tiling.in_tiles);
  p.vector_result = whole_inputs(a.dweight, 0, a);
  const std::string kernel = std::string("tdc_conv_wgrad_") + product_name(a) + "_" + tiling.tile.name;
  unsigned blocks = blocks_of({tiling.splits, a.num_experts, taps_of(a), tiling.out_tiles, tiling.in_tiles}, a);
  p.weight_blocks = static_cast<int>(blocks);
  const bool with_bias = sums_bias_with_weight(a);
  if (with_bias) {
    p.bias_tiles = static_cast<int>(ceil_div(a.out_channels, kBiasSumChunks * per_chunk(a)));
    p.dbias = pointer<void>(a.dbias);
    p.bias_partials = p.partials + partial_bytes(a, device) / sizeof(float);
    p.vector_grads = whole_chunks(a.out_channels, {a.dy}, a);
    const int64_t bias_blocks = tiling.splits * a.num_experts * p.bias_tiles;
    blocks = blocks_of({blocks + bias_blocks}, a);
  }
  launches.push_back(launch_of(kernel, blocks, tiling.tile.threads, tiling.tile.shared_bytes, p, a));
  if (tiling.splits == 1) return;

  ConvReduceParams r{};
  r.partials = p.partials;
  r.dweight = p.dweight;
  r.count = weight_elements(a);
  r.splits = p.splits;
  r.bias_partials = p.bias_partials;
  r.dbias = p.dbias;
  r.bias_count = with_bias ? a.num_experts * a.out_channels : 0;
  launches.push_back(launch_of(std::string("tdc_conv_reduce_") + storage_name(a),
                               blocks_of({ceil_div(r.count + r.bias_count, kConvSumThreads)}, a), kConvSumThreads, 0, r,
                               a));
}

void add_channel_sums(const ConvArguments& a, float* sums, std::vector<Launch>& launches) {
  if (a.batch > 0) {
    ConvSampleSumParams p{};
    p.dy = pointer<const void>(a.dy);
    p.dsample_bias = pointer<void>(a.dsample_bias);
    p.sums = a.dbias ? sums : nullptr;
    p.routing = routing_of(a);
    p.pixels = static_cast<int>(a.out_height() * a.out_width());
    p.channels = static_cast<int>(a.out_channels);
    p.channel_tiles = static_cast<int>(ceil_div(a.out_channels, kSampleSumChunks * per_chunk(a)));
    p.vector_source = whole_chunks(a.out_channels, {a.dy}, a);
    launches.push_back(launch_of(std::string("tdc_conv_sample_sums_") + storage_name(a),
                                 blocks_of({a.batch, p.channel_tiles}, a), kConvSumThreads, 0, p, a));
  }
  if (!a.dbias) return;

  ConvExpertSumParams p{};
  p.sums = sums;
  p.dbias = pointer<void>(a.dbias);
  p.routing = routing_of(a);
  p.channels = static_cast<int>(a.out_channels);
  p.channel_tiles = static_cast<int>(ceil_div(a.out_channels, kExpertSumChannels));
  launches.push_back(launch_of(std::string("tdc_conv_expert_sums_") + storage_name(a),
                               blocks_of({a.num_experts, p.channel_tiles}, a), kConvSumThreads, 0, p, a));
}

}  // namespace

std::vector<Launch> launch_conv_forward(const ConvArguments& arguments, const Device& device) {
  const ConvForm form = conv_form(arguments, device, true);
  if (form == ConvForm::kFew) return launch_few_images(arguments, device, ConvDirection::kForward);
  return form == ConvForm::kHopper && has_workspace(arguments) ? launch_hopper_forward(arguments, device)
                                                               : launch_images(arguments, device, true);
}

std::vector<Launch> launch_conv_dgrad(const ConvArguments& arguments, const Device& device) {
  const ConvForm form = conv_form(arguments, device, false);
  if (form == ConvForm::kFew) return launch_few_images(arguments, device, ConvDirection::kDgrad);
  if (form == ConvForm::kHopper && has_workspace(arguments)) return launch_hopper_dgrad(arguments, device);
  return arguments.workspace && merges_taps(arguments) ? launch_merged_dgrad(arguments, device)
                                                       : launch_images(arguments, device, false);
}

size_t conv_forward_workspace(const ConvArguments& a, const Device& device) {
  return a.upsample > 1 && a.batch > 0 && conv_form(a, device, true) == ConvForm::kHopper ? merged_bytes(a) : 0;
}

size_t conv_dgrad_workspace(const ConvArguments& a, const Device&) {
  check(a);
  return merges_taps(a) ? merged_bytes(a) : 0;
}

std::vector<Launch> launch_conv_wgrad(const ConvArguments& arguments, const Device& device) {
  check(arguments);
  require_architecture(device);
  std::vector<Launch> launches;
  const ConvForm form = wgrad_form(arguments, device);
  if (arguments.dweight && form == ConvForm::kFew) {
    launches = launch_few_wgrad(arguments, device);
  } else if (arguments.dweight && form == ConvForm::kHopper) {
    launches = launch_hopper_wgrad(arguments, device);
  } else if (arguments.dweight) {
    add_dweight(arguments, device, launches);
  }
  const size_t partials = partial_bytes(arguments, device);
  if ((arguments.dbias || arguments.dsample_bias) && !has_biases_with_weight(arguments, device)) {
    add_channel_sums(arguments, pointer<float>(arguments.workspace + partials), launches);
  }
  return launches;
}

size_t conv_wgrad_workspace(const ConvArguments& arguments, const Device& device) {
  check(arguments);
  return partial_bytes(arguments, device) + bias_bytes(arguments, device);
}

}  // namespace tdc
