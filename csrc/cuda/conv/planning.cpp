#include "cuda/conv/planning.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace tdc::conv {
namespace {

std::string shape_of(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text + ")";
}

}  // namespace

std::string describe(const ConvArguments& a) {
  return "x " + shape_of({a.batch, a.in_channels, a.height, a.width}) + " " + product_name(a) + ", weight " +
         shape_of({a.num_experts, a.out_channels, a.in_channels, a.filter_height, a.filter_width}) + ", stride " +
         shape_of({a.stride_height, a.stride_width}) + ", padding " + shape_of({a.pad_height, a.pad_width}) + ", " +
         std::to_string(a.num_groups) + " groups" +
         (a.x2_channels ? ", the last " + std::to_string(a.x2_channels) + " channels in x2" : "") +
         (a.upsample > 1 ? ", upsampled" : "");
}

void require(bool holds, const char* what, const ConvArguments& a) {
  if (!holds) throw std::invalid_argument(std::string("routed convolution: ") + what + ": " + describe(a));
}

// Kernels count pixels and channels in 32 bits, elements in 64.
void check(const ConvArguments& a) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;
  for (int64_t size : {a.height, a.width, a.in_channels, a.out_channels, a.filter_height, a.filter_width,
                       a.stride_height, a.stride_width, a.num_groups, a.num_experts}) {
    require(size >= 1 && size <= kMost, "a size is out of range", a);
  }
  for (int64_t size : {a.batch, a.pad_height, a.pad_width}) {
    require(size >= 0 && size <= kMost, "a size is out of range", a);
  }
  require(a.x2_channels >= 0 && a.x2_channels < a.in_channels, "x2 has no channels, or all of them", a);
  require(a.upsample == 1 || a.upsample == 2, "images are upsampled to twice their size or not at all", a);
  require(a.out_height() >= 1 && a.out_width() >= 1, "the filter is larger than the padded image", a);
  require(a.dtype == 1 || a.dtype == 2 || (a.dtype == 0 && a.tf32), "dtypes are bf16, fp16 and fp32 as tf32", a);
  const int64_t most_pixels = kMost / std::max<int64_t>(a.batch, 1);
  require(a.height <= most_pixels / a.width && a.out_height() <= most_pixels / a.out_width(),
          "the batch has more than 2^30 pixels", a);
  require(a.filter_height <= kMost / a.filter_width, "the filter has too many taps", a);
}

unsigned blocks_of(std::initializer_list<int64_t> factors, const ConvArguments& a) {
  int64_t blocks = 1;
  for (int64_t factor : factors) {
    require(factor <= std::numeric_limits<int>::max() / blocks, "the grid is too large", a);
    blocks *= factor;
  }
  return static_cast<unsigned>(blocks);
}

FastDivisor fast_divisor(int64_t divisor) {
  int log = 0;
  while ((int64_t{1} << log) < divisor) ++log;
  if (log == 0) return {1, 0, 0};
  const uint64_t multiplier = ((uint64_t{1} << (31 + log)) + static_cast<uint64_t>(divisor) - 1) / divisor;
  return {static_cast<unsigned>(divisor), static_cast<unsigned>(multiplier), static_cast<unsigned>(log - 1)};
}

ConvRouting routing_of(const ConvArguments& a) {
  return {pointer<const int>(a.offsets),    pointer<const int>(a.weight_index), pointer<const int>(a.in_widths),
          pointer<const int>(a.out_widths), static_cast<int>(a.batch),          static_cast<int>(a.num_groups),
          static_cast<int>(a.num_experts)};
}

ConvGeometry geometry_of(const ConvArguments& a) {
  return {static_cast<int>(a.height),        static_cast<int>(a.width),
          static_cast<int>(a.in_channels),   static_cast<int>(a.out_height()),
          static_cast<int>(a.out_width()),   static_cast<int>(a.out_channels),
          static_cast<int>(a.filter_height), static_cast<int>(a.filter_width),
          static_cast<int>(a.stride_height), static_cast<int>(a.stride_width),
          static_cast<int>(a.pad_height),    static_cast<int>(a.pad_width),
          static_cast<int>(a.x_channels()),  a.upsample == 2};
}

bool whole_chunks(int64_t channels, std::initializer_list<uintptr_t> addresses, const ConvArguments& a) {
  bool aligned = channels % per_chunk(a) == 0;
  for (uintptr_t address : addresses) aligned = aligned && address % 16 == 0;
  return aligned;
}

bool whole_inputs(uintptr_t x, uintptr_t x2, const ConvArguments& a) {
  return whole_chunks(a.x_channels(), {x}, a) && whole_chunks(a.x2_channels, {x2}, a);
}

TensorMap tensor_map_of(uintptr_t address, const TensorSizes& sizes, const TensorSizes& box, const ConvArguments& a) {
  TensorMap map{};
  map.address = address;
  unsigned long long stride = 2;
  for (size_t d = 0; d < TensorMap::kMostDimensions; ++d) {
    const bool used = d < sizes.size();
    map.sizes[d] = used ? static_cast<unsigned>(sizes[d]) : 1;
    map.box[d] = used ? static_cast<unsigned>(box[d]) : 1;
    if (d > 0 && used) map.strides[d - 1] = stride *= static_cast<unsigned long long>(sizes[d - 1]);
  }
  map.dimensions = static_cast<int>(sizes.size());
  map.half = a.dtype == 2;
  return map;
}

TensorMap plane_of(uintptr_t address, int64_t channels, int plane, const TensorSizes& box, const ConvArguments& a) {
  const int64_t down = plane / 2, across = plane % 2;
  const TensorSizes sizes = {channels, (a.width - across + 1) / 2, (a.height - down + 1) / 2, a.batch};
  TensorMap map =
      tensor_map_of(address + static_cast<uintptr_t>(2 * (down * a.width + across) * channels), sizes, box, a);
  map.strides[0] = static_cast<unsigned long long>(4 * channels);
  map.strides[1] = static_cast<unsigned long long>(4 * a.width * channels);
  map.strides[2] = static_cast<unsigned long long>(2 * a.height * a.width * channels);
  return map;
}

Launch launch_merge_taps(const ConvArguments& a, const char* name) {
  ConvMergeParams p{};
  p.weight = pointer<const void>(a.weight);
  p.merged = pointer<void>(a.workspace);
  p.in_channels = static_cast<int>(a.in_channels);
  p.out_channels = static_cast<int>(a.out_channels);
  p.filter_height = static_cast<int>(a.filter_height);
  p.filter_width = static_cast<int>(a.filter_width);
  p.in_tiles = static_cast<int>(ceil_div(a.in_channels, kMergeChannels));
  p.out_tiles = static_cast<int>(ceil_div(a.out_channels, kMergeChannels));
  const int64_t taps = (a.filter_height + 1) * (a.filter_width + 1);
  return launch_of(std::string(name) + storage_name(a), blocks_of({a.num_experts, taps, p.in_tiles, p.out_tiles}, a),
                   kConvSumThreads, 0, p, a);
}

ConvArguments merged_convolution(const ConvArguments& a) {
  ConvArguments merged = a;
  merged.x = a.dy, merged.y = a.dx, merged.dy = a.x, merged.dx = a.y, merged.weight = a.workspace;
  merged.height = a.out_height(), merged.width = a.out_width();
  merged.in_channels = a.out_channels, merged.out_channels = a.in_channels;
  merged.in_widths = a.out_widths, merged.out_widths = a.in_widths;
  merged.filter_height = a.filter_height + 1, merged.filter_width = a.filter_width + 1;
  merged.pad_height = a.filter_height - 1 - a.pad_height, merged.pad_width = a.filter_width - 1 - a.pad_width;
  merged.stride_height = merged.stride_width = 2;
  merged.upsample = 1;
  return merged;
}

}  // namespace tdc::conv
