// The inner loops of the convolution, one table per instruction set. Everything around them is compiled once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_isa.h"

namespace tdc {

// Vectors in a panel; see cpu/conv.h for the words used here.
constexpr int kPanelVectors = 2;

// One output pixel of a gather tile.
struct ConvPixel {
  const float* source;   // its input pixel, before tap offsets
  const float* init;     // (padded channels): bias of this sample, zero past the live width
  const void* residual;  // (channels) or null
  void* out;             // (channels)
};

// What all tiles of a panel have in common.
struct PanelTile {
  int vectors;      // 1 .. kPanelVectors
  int64_t channel;  // first output channel of the panel
  int64_t depth;
  const float* weights;  // rows of `row` floats
  int64_t row;
  int64_t live;      // output channels in use; the last panel also zeroes [live, channels)
  int64_t channels;  // of an output pixel
  bool last;         // the panel that ends at `live`
};

struct GatherTap {
  ptrdiff_t source;  // element offset from a pixel's source
  ptrdiff_t weight;  // first packed row
};

// The order of a pixel's sums follows from taps, depth, live and narrow alone: whatever pixels share its tile, it gets
// the same bits.
//
// out[p, k] = sum over taps and depth c of source[p][tap.source + c] * weights[tap.weight + c, k] + init[p, k]
// (+ residual).
struct GatherTile : PanelTile {
  const ConvPixel* pixels;
  int num_pixels;  // 1 .. ConvKernels::pixels, half as many at most if narrow
  bool narrow;     // more chains of sums for each pixel, for images that cannot fill tiles
  const GatherTap* taps;
  int64_t num_taps;
};

// A row of a filter with three columns.
struct RowTap {
  ptrdiff_t source;      // element offset from a pixel's source
  ptrdiff_t weights[3];  // first packed rows for the source pixel before it, for this one and for the one after it
};

// kRowPixels adjacent pixels of a row, of a convolution with three columns and stride 1. A source value is read once
// for the three pixels that it contributes to, so loads do not set the pace, and pixels at the ends of an image share
// the tile of the others. Sums are those of a gather tile, in another order, which follows from taps and depth alone.
constexpr int kRowPixels = 8;

struct RowTile : PanelTile {
  ConvPixel first;   // the others follow it in all its tensors but init
  ptrdiff_t step;    // floats from source pixel to source pixel
  bool left, right;  // whether the source has pixels before the first and after the last
  const RowTap* taps;
  int64_t num_taps;
};

// 1 .. kFlatPixels adjacent pixels of a filter of one pixel with stride 1, by two adjacent panels, both of
// kPanelVectors vectors. Sums are those of a gather tile that is not narrow.
constexpr int kFlatPixels = 6;

struct FlatTile : PanelTile {
  const float* next_weights;  // of the second panel
  ConvPixel first;            // the others follow it in all its tensors but init
  ptrdiff_t step;             // floats from source pixel to source pixel
  int num_pixels;
};

// Elements of one output pixel in the operands of an outer tile.
struct PixelPair {
  int32_t x, dy;
};

// sums[m, k] += sum over pixels i of source[m][pixels[i].x] * dy[pixels[i].dy + k]   for m < rows.
struct OuterTile {
  const float* source;  // rows are adjacent: source[m] = source + m
  int rows;             // 1 .. ConvKernels::pixels
  int vectors;
  const PixelPair* pixels;
  int64_t num_pixels;
  const float* dy;
  float* sums;
  int64_t row;  // floats from row to row of sums
};

// A panel of packed weights:
// packed[t * tap_rows + d][lane] = weights[lane * lane_stride + d * depth_stride + taps[t]], zero for lanes not live.
struct PanelPack {
  const void* weights;
  const void* end;  // one past the last readable element
  int64_t lanes;    // live lanes, 1 .. row
  int64_t lane_stride, depth_stride, depth;
  const int64_t* taps;    // element offsets
  const int32_t* tap_at;  // inverse of taps where those are a permutation of 0 .. num_taps - 1, else null
  int64_t num_taps;
  float* packed;
  int64_t tap_rows;  // packed rows from tap to tap
  int64_t row;       // floats per packed row: a multiple of the vector length
};

// The reverse, for weight gradients:
// weights[lane * lane_stride + c * depth_stride + taps[t]] = sums[t * depth + c][lane].
struct PanelUnpack {
  const float* sums;
  int64_t row, depth;
  const int64_t* taps;
  bool taps_dense;  // taps[t] == t
  int64_t num_taps, lanes, lane_stride, depth_stride;
  void* weights;
};

struct ConvKernels {
  int lanes;
  int pixels;  // pixels (rows) of a full register tile
  // Tables indexed by dtype where the types in memory matter.
  void (*gather[2])(const GatherTile&);
  void (*row[2])(const RowTile&);    // null where the registers are too few
  void (*flat[2])(const FlatTile&);  // likewise
  void (*outer)(const OuterTile&);
  void (*pack[2])(const PanelPack&);
  void (*unpack[2])(const PanelUnpack&);
  // `rows` rows of `count` elements to fp32; destination elements count .. padded of each row become zero.
  void (*copy[2])(const void* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t count,
                  int64_t padded);
  // sums[k] = sum over rows of from[row * stride + k].
  void (*sum_rows[2])(const void* from, int64_t stride, int64_t rows, int64_t count, float* sums);
  void (*narrow[2])(const float* from, void* to, int64_t count);
  void (*add)(const float* from, float* to, int64_t count);
};

TDC_ISA_DECLARE(const ConvKernels& conv_kernels();)

}  // namespace tdc
