// What the kernels for layers of few channels receive: convolutions of stride 1 that keep the image's size, from or to
// at most kFewMost channels, such as the first and last layer of a UNet.
//
//   the few       the image with few channels: x of the first layer, dy (or y) of the last one
//   the many      the image on the other side, whose channels are whole 16-byte chunks
//
// Products with a tap of the few are a matrix product whose rows or columns are (tap, few channel) pairs, "entries".
#pragma once

#include "cuda/conv/params.h"

namespace tdc {

constexpr int kFewMost = 7;  // one less than a chunk
// Entries that a kernel has room for. In wgrad one more than there are: it may be a row of ones.
constexpr int kFewEntries = 32, kFewMostEntries = 64;

// Bytes of a patch of the few in shared memory: the rows of pixels that a block works on, and those around them; in
// wgrad with a table of the pixels' places before it.
constexpr int kFewPatchBytes = 16384;

struct ConvFewGeometry {
  int height, width;  // of both images
  int many, few;      // channels
  int filter_height, filter_width;
  int pitch;  // elements of a row of a patch: those of the image's row with the padding
  int band;   // rows of a patch without the padding
  FastDivisor by_pixels, by_width, by_pitch, by_few;  // of an image; of its row; pitch; few
};

// Forward and dgrad.
constexpr int kFewWarpColumns = 32;  // of many channels
constexpr int kFewMostThreads = 256;

constexpr int kFewStep = kFewMostThreads / 32 * 16;  // to few channels: pixels that a block multiplies at once

struct ConvFewImageParams {
  const void* source;  // forward: x; dgrad: dy
  const void* weight;
  const void* bias;         // (experts, C_out) or null
  const void* sample_bias;  // (B, C_out) or null
  const void* residual;     // like y or null
  void* result;             // forward: y; dgrad: dx
  ConvRouting routing;
  ConvFewGeometry geometry;
  int dgrad;                         // 1: the result is dx
  int runs, run;                     // blocks that share the pixels of a sample, and pixels that each has
  int channel_tiles, tile_channels;  // to many: blocks of a run, and channels that each has, whole warps of them
  int ring, ring_pitch;              // to few: pixels whose products are in shared memory, floats that each has there
  int weight_bytes;                  // in shared memory, before everything else
};

// wgrad. Channels of the many that a block sums at most, and pixels that a stage of its pipeline holds.
constexpr int kFewColumns = 128, kFewStages = 4;
// Threads of a block: a warp has 16 entries x 64 channels.
constexpr int few_wgrad_threads(int entries) { return entries / 16 * 2 * 32; }
constexpr int few_wgrad_shared_bytes() { return kFewStages * kConvDepth * kFewColumns * 2 + kFewPatchBytes; }

struct ConvFewWgradParams {
  const void* many;
  const void* few;
  void* dweight;    // (experts, C_out, R, S, C_in)
  void* dbias;      // (experts, C_out) or null
  float* partials;  // (shares + num_groups, entries, many)
  ConvRouting routing;
  ConvFewGeometry geometry;
  int few_outputs;                   // 1: the few are dy, else x
  int entries;                       // with one for dbias, which comes last
  int table_bytes;                   // of places
  int units;                         // of all pixels of the batch, kConvDepth each
  int shares;                        // equal parts of the units
  int channel_tiles, tile_channels;  // blocks of a share, and channels that each has
};

constexpr int kFewReduceThreads = 256;

}  // namespace tdc
