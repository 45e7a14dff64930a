#include "cuda/conv/few_launch.h"

#include <algorithm>

#include "cuda/conv/few_params.h"
#include "cuda/conv/planning.h"

namespace tdc {

using namespace conv;

namespace {

constexpr int64_t kLeastPixels = 64;  // of an image

bool few_outputs(const ConvArguments& a) { return a.out_channels < a.in_channels; }
int64_t few_of(const ConvArguments& a) { return std::min(a.in_channels, a.out_channels); }
int64_t many_of(const ConvArguments& a) { return std::max(a.in_channels, a.out_channels); }
int64_t entries_of(const ConvArguments& a) { return a.filter_height * a.filter_width * few_of(a); }

int64_t pitch_of(const ConvArguments& a) { return (a.width + a.filter_width - 1) * few_of(a); }
// Bytes of a table of the places of `rows` rows of pixels and of a stage that ends past them.
int64_t table_bytes(const ConvArguments& a, int64_t rows) {
  return ceil_div((rows * a.width + kConvDepth) * 2, 16) * 16;
}
// Rows of pixels whose patch and table fit into shared memory.
int64_t band_of(const ConvArguments& a) {
  const int64_t around = (a.filter_height - 1) * pitch_of(a) * 2 + kConvDepth * 2 + 16;
  return std::min(a.height, (kFewPatchBytes - around) / ((pitch_of(a) + a.width) * 2));
}

// Of all directions.
std::string refusal(const ConvArguments& a) {
  if (a.dtype == 0) return "it multiplies in bf16 and fp16";
  if (few_of(a) > kFewMost) return "it has at most " + std::to_string(kFewMost) + " channels on one side";
  if (many_of(a) % per_chunk(a) != 0) return "the larger number of channels is no multiple of 8";
  if (a.x2_channels > 0) return "it has one input";
  if (a.upsample > 1) return "it does not upsample images";
  if (a.stride_height > 1 || a.stride_width > 1) return "it has stride 1";
  if (2 * a.pad_height + 1 != a.filter_height || 2 * a.pad_width + 1 != a.filter_width) {
    return "it pads images so that they keep their size";
  }
  if (entries_of(a) >= kFewMostEntries) {
    return "it has fewer than " + std::to_string(kFewMostEntries) + " pairs of a tap and one of the few channels";
  }
  if (a.height * a.width < kLeastPixels) return "it has at least " + std::to_string(kLeastPixels) + " pixels";
  if (band_of(a) < 1) return "rows of its image do not fit into shared memory";
  return "";
}

ConvFewGeometry few_geometry_of(const ConvArguments& a) {
  ConvFewGeometry g{};
  g.height = static_cast<int>(a.height);
  g.width = static_cast<int>(a.width);
  g.many = static_cast<int>(many_of(a));
  g.few = static_cast<int>(few_of(a));
  g.filter_height = static_cast<int>(a.filter_height);
  g.filter_width = static_cast<int>(a.filter_width);
  g.pitch = static_cast<int>(pitch_of(a));
  g.band = static_cast<int>(band_of(a));
  g.by_pixels = fast_divisor(a.height * a.width);
  g.by_width = fast_divisor(a.width);
  g.by_pitch = fast_divisor(pitch_of(a));
  g.by_few = fast_divisor(few_of(a));
  return g;
}

// Room for the entries, and for one more: in wgrad a row of ones takes the first that is free.
int room_of(const ConvArguments& a) { return entries_of(a) < kFewEntries ? kFewEntries : kFewMostEntries; }

bool to_many(const ConvArguments& a, ConvDirection direction) {
  return (direction == ConvDirection::kForward) != few_outputs(a);
}

// How a forward or dgrad is divided into blocks.
struct ImageSplit {
  int64_t run, channel_tiles, tile_channels, threads, weight_bytes;
  int64_t ring, ring_pitch;  // to few channels
  int64_t shared_bytes;
};

// Three blocks or more for every SM, and runs whose patch fits; `run` is 0 where none does.
ImageSplit split_to_many(const ConvArguments& a, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 3, kMostRun = 1024, kLeastRun = 16;
  ImageSplit split{};
  const int64_t warps = ceil_div(many_of(a), kFewWarpColumns);
  split.channel_tiles = ceil_div(warps, kFewMostThreads / 32);
  const int64_t across = ceil_div(warps, split.channel_tiles), down = kFewMostThreads / 32 / across;
  split.tile_channels = across * kFewWarpColumns;
  split.threads = across * down * 32;
  split.weight_bytes = split.tile_channels * room_of(a) * 2;
  split.shared_bytes = split.weight_bytes + kFewPatchBytes;
  const auto fits = [&](int64_t run) { return ceil_div(run + a.width - 1, a.width) <= band_of(a); };
  const auto fills = [&](int64_t run) {
    const int64_t blocks = a.batch * ceil_div(a.height * a.width, run) * split.channel_tiles;
    return run <= kLeastRun * down || blocks >= kBlocksPerMultiprocessor * device.multiprocessors;
  };
  for (split.run = kMostRun; split.run >= kLeastRun && !(fits(split.run) && fills(split.run));) split.run /= 2;
  if (split.run < kLeastRun) split.run = 0;
  return split;
}

// Three blocks for two SMs or more: every one multiplies again what its neighbours need, so they should be few.
ImageSplit split_to_few(const ConvArguments& a, const Device& device) {
  const int64_t pixels = a.height * a.width, reach = a.filter_height / 2 * a.width + a.filter_width / 2;
  ImageSplit split{};
  int64_t runs = 1;
  while (2 * a.batch * runs < 3 * device.multiprocessors && pixels / (2 * runs) >= kFewStep) runs *= 2;
  split.run = ceil_div(ceil_div(pixels, runs), 16) * 16;
  split.channel_tiles = 1;
  split.threads = kFewMostThreads;
  split.weight_bytes = ceil_div(many_of(a), 32) * 32 * room_of(a) * 2;
  // What a warp adds to the ring may be a step ahead of what another one still reads.
  split.ring = std::min(2 * reach + 2 * kFewStep, split.run + 2 * reach);
  split.ring_pitch = ceil_div(entries_of(a), 4) * 4;
  split.shared_bytes = split.weight_bytes + split.ring * split.ring_pitch * 4;
  return split;
}

struct WgradSplit {
  int64_t entries, units, shares, channel_tiles, tile_channels;
};

// Two blocks for every SM, where each has eight steps of the pipeline.
WgradSplit split_wgrad(const ConvArguments& a, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 2, kLeastSteps = 8;
  WgradSplit split{};
  split.entries = entries_of(a) + (sums_bias_with_weight(a) ? 1 : 0);
  split.units = ceil_div(a.batch * a.height * a.width, kConvDepth);
  split.channel_tiles = ceil_div(many_of(a), kFewColumns);
  split.tile_channels = ceil_div(ceil_div(many_of(a), split.channel_tiles), 8) * 8;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * device.multiprocessors, split.channel_tiles);
  split.shares = std::max<int64_t>(1, std::min(wanted, split.units / kLeastSteps));
  return split;
}

}  // namespace

std::string few_refusal(const ConvArguments& a, const Device& device, ConvDirection direction) {
  const std::string reason = refusal(a);
  if (!reason.empty()) return reason;
  uintptr_t many = few_outputs(a) ? a.x : a.dy;
  int64_t shared_bytes = few_wgrad_shared_bytes();
  if (direction != ConvDirection::kWgrad) {
    const bool widens = to_many(a, direction);
    const ImageSplit split = widens ? split_to_many(a, device) : split_to_few(a, device);
    shared_bytes = split.shared_bytes;
    if (split.run == 0) return "rows of its image do not fit into shared memory";
    if (widens) many = direction == ConvDirection::kDgrad ? a.dx : a.y | a.residual;
  }
  if (shared_bytes > device.shared_limit) return "what it keeps does not fit into shared memory";
  return many % 16 == 0 ? "" : "the image of many channels is not aligned to 16 bytes";
}

std::vector<Launch> launch_few_images(const ConvArguments& a, const Device& device, ConvDirection direction) {
  if (a.batch == 0) return {};
  const bool forward = direction == ConvDirection::kForward, widens = to_many(a, direction);
  const ImageSplit split = widens ? split_to_many(a, device) : split_to_few(a, device);
  ConvFewImageParams p{};
  p.source = pointer<const void>(forward ? a.x : a.dy);
  p.weight = pointer<const void>(a.weight);
  if (forward) {
    p.bias = pointer<const void>(a.bias);
    p.sample_bias = pointer<const void>(a.sample_bias);
    p.residual = pointer<const void>(a.residual);
  }
  p.result = pointer<void>(forward ? a.y : a.dx);
  p.routing = routing_of(a);
  p.geometry = few_geometry_of(a);
  p.dgrad = !forward;
  p.runs = static_cast<int>(ceil_div(a.height * a.width, split.run));
  p.run = static_cast<int>(split.run);
  p.channel_tiles = static_cast<int>(split.channel_tiles);
  p.tile_channels = static_cast<int>(split.tile_channels);
  p.ring = static_cast<int>(split.ring);
  p.ring_pitch = static_cast<int>(split.ring_pitch);
  p.weight_bytes = static_cast<int>(split.weight_bytes);
  const std::string kernel = std::string(widens ? "tdc_conv_few_to_many_" : "tdc_conv_many_to_few_") + storage_name(a) +
                             "_" + std::to_string(room_of(a));
  return {launch_of(kernel, blocks_of({a.batch, p.runs, split.channel_tiles}, a), static_cast<int>(split.threads),
                    static_cast<int>(split.shared_bytes), p, a)};
}

size_t few_wgrad_workspace(const ConvArguments& a, const Device& device) {
  const WgradSplit split = split_wgrad(a, device);
  return static_cast<size_t>((split.shares + a.num_groups) * split.entries * many_of(a)) * sizeof(float);
}

std::vector<Launch> launch_few_wgrad(const ConvArguments& a, const Device& device) {
  const WgradSplit split = split_wgrad(a, device);
  ConvFewWgradParams p{};
  p.many = pointer<const void>(few_outputs(a) ? a.x : a.dy);
  p.few = pointer<const void>(few_outputs(a) ? a.dy : a.x);
  p.dweight = pointer<void>(a.dweight);
  p.dbias = pointer<void>(sums_bias_with_weight(a) ? a.dbias : 0);
  p.partials = pointer<float>(a.workspace);
  p.routing = routing_of(a);
  p.geometry = few_geometry_of(a);
  p.few_outputs = few_outputs(a);
  p.entries = static_cast<int>(split.entries);
  p.table_bytes = static_cast<int>(table_bytes(a, p.geometry.band));
  p.units = static_cast<int>(split.units);
  p.shares = static_cast<int>(split.shares);
  p.channel_tiles = static_cast<int>(split.channel_tiles);
  p.tile_channels = static_cast<int>(split.tile_channels);
  const std::string name = "tdc_conv_few_wgrad_", type = storage_name(a);
  const int room = room_of(a);
  const int64_t reducers = a.num_experts * split.entries * ceil_div(many_of(a), 32);
  return {launch_of(name + type + "_" + std::to_string(room), blocks_of({split.shares, split.channel_tiles}, a),
                    few_wgrad_threads(room), few_wgrad_shared_bytes(), p, a),
          launch_of(name + "reduce_" + type, blocks_of({reducers}, a), kFewReduceThreads, 0, p, a)};
}

}  // namespace tdc
