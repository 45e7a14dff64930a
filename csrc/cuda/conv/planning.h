// What the planners of all forms of the convolution share: descriptions, checks, parameters.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cuda/conv/launch.h"
#include "cuda/conv/params.h"
#include "cuda/tensor_map.h"

namespace tdc::conv {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The element type, its size, and elements in 16 bytes. The product's name says tf32 of fp32.
inline int element_bytes(const ConvArguments& a) { return a.dtype == 0 ? 4 : 2; }
inline int per_chunk(const ConvArguments& a) { return 16 / element_bytes(a); }
inline const char* storage_name(const ConvArguments& a) {
  return a.dtype == 0 ? "fp32" : a.dtype == 1 ? "bf16" : "fp16";
}
inline const char* product_name(const ConvArguments& a) { return a.dtype == 0 ? "tf32" : storage_name(a); }

// The shapes, for messages.
std::string describe(const ConvArguments& a);

// Throws std::invalid_argument with the shapes unless what must hold does.
void require(bool holds, const char* what, const ConvArguments& a);

// Throws std::invalid_argument where the sizes and dtypes are none that kernels take.
void check(const ConvArguments& a);

// Whether dbias comes out of the launches of dweight in the portable form; where dsample_bias is wanted, both have
// their own.
inline bool sums_bias_with_weight(const ConvArguments& a) { return a.dweight && a.dbias && !a.dsample_bias; }

// The product of numbers of blocks; throws where a grid is too large.
unsigned blocks_of(std::initializer_list<int64_t> factors, const ConvArguments& a);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// n / d = (n * multiplier) >> 32 >> shift for all 0 <= n < 2^31: multiplier = ceil(2^(31 + l) / d), l = ceil(log2 d).
FastDivisor fast_divisor(int64_t divisor);

ConvRouting routing_of(const ConvArguments& a);
ConvGeometry geometry_of(const ConvArguments& a);

// Whether rows of `channels` channels at these addresses (0: absent) consist of whole 16-byte chunks.
bool whole_chunks(int64_t channels, std::initializer_list<uintptr_t> addresses, const ConvArguments& a);

// The same of x and x2, or of their gradients: no chunk has channels of both.
bool whole_inputs(uintptr_t x, uintptr_t x2, const ConvArguments& a);

// The description of a dense tensor of 16-bit elements and of boxes of it, from the innermost dimension on.
using TensorSizes = std::array<int64_t, 4>;
TensorMap tensor_map_of(uintptr_t address, const TensorSizes& sizes, const TensorSizes& box, const ConvArguments& a);

// The pixels of an image whose row and column have the parity of a plane, 2 * (row % 2) + column % 2, as a tensor of
// their own.
TensorMap plane_of(uintptr_t address, int64_t channels, int plane, const TensorSizes& box, const ConvArguments& a);

// Of an image that is upsampled, with stride 1: the launch that merges taps into the workspace (merge.cuh), named by
// what stands before the dtype, and the convolution on them. This one leads from y to x, with stride 2: its forward
// computes dx, its dgrad y.
Launch launch_merge_taps(const ConvArguments& a, const char* name);
ConvArguments merged_convolution(const ConvArguments& a);

// Tiles in the order of the clocks that they take, the fewest first; those that take as many stay in their order.
template <class Tile, class Clocks>
std::vector<Tile> by_clocks(std::vector<Tile> tiles, const Clocks& clocks_of) {
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const Tile& one, const Tile& other) { return clocks_of(one) < clocks_of(other); });
  return tiles;
}

// The most stages, from `least` to `most`, whose shared_bytes(stages, num_groups) a block can have; 0 where none fits.
template <class SharedBytes>
int most_stages(int least, int most, const ConvArguments& a, const Device& device, const SharedBytes& shared_bytes) {
  for (int stages = most; stages >= least; --stages)
    if (shared_bytes(stages, static_cast<int>(a.num_groups)) <= device.shared_limit) return stages;
  return 0;
}

template <class Params>
Launch launch_of(std::string kernel, unsigned blocks, int threads, int shared_bytes, const Params& params,
                 const ConvArguments& a) {
  return {std::move(kernel),
          {blocks, 1, 1},
          static_cast<unsigned>(threads),
          static_cast<unsigned>(shared_bytes),
          bytes_of(params),
          describe(a),
          {}};
}

}  // namespace tdc::conv
