// What the Hopper form of forward and dgrad receives, and the tiles and shared memory that host and device agree on.
#pragma once

#include "cuda/conv/params.h"
#include "cuda/tensor_map.h"

namespace tdc {

constexpr int kHopperThreads = 384;           // warpgroup 0 loads, 1 and 2 multiply
constexpr int kHopperDepth = 64;              // channels of a stage: rows of 128 bytes
constexpr int kHopperRow = 2 * kHopperDepth;  // bytes of it
constexpr int kHopperTaps = 9;                // of the filter
constexpr int kHopperSourceStages = 2;        // each serves all taps
constexpr int kHopperMostWeightStages = 8;    // one tap each; as many as fit
constexpr int kHopperMessages = 4;            // tiles that the producer may be ahead
constexpr int kHopperStoreBytes = 2048;       // a store buffer
constexpr int kHopperMostGroups = kHopperThreads;

// A product of a tile has all columns of it, three quarters of them or half, but no fewer than the tile's least: 64
// where the loads of a step take longer than products of 64 columns (hopper_model.h).
constexpr int hopper_three_quarters(int columns, int least) {
  return columns / 4 * 3 < least ? least : columns / 4 * 3;
}
constexpr int hopper_half(int columns, int least) { return columns / 2 < least ? least : columns / 2; }

// The filter is 3 x 3 with padding 1 and stride 1. The unit of work is a patch: 8 x 8 pixels of one sample, the 64 rows
// of one wgmma. A tile is kDown x kAcross patches of each of kSamples samples, times kColumns channels of the result;
// two warpgroups multiply half of the patches each.
template <int kDown_, int kAcross_, int kSamples_, int kColumns_, int kStoreBuffers_>
struct HopperTile {
  static constexpr int kDown = kDown_, kAcross = kAcross_, kSamples = kSamples_, kColumns = kColumns_;
  static constexpr int kPatches = kDown * kAcross * kSamples;
  static constexpr int kLeastColumns = kPatches == 8 ? 32 : 64;  // eight patches take longer than their loads
  static constexpr int kThreeQuarters = hopper_three_quarters(kColumns, kLeastColumns);
  static constexpr int kHalf = hopper_half(kColumns, kLeastColumns);
  static constexpr int kStoreBuffers = kStoreBuffers_;  // of each warp: 16 pixels of 64 channels
  static constexpr int kRegistersOfSums = kPatches / 2 * kColumns / 2;
  // A stage of the source: the pixels of a tile and those around them, at a multiple of 1024 bytes.
  static constexpr int kBoxHeight = 8 * kDown + 2, kBoxWidth = 8 * kAcross + 2;
  static constexpr int kSourceBytes = kSamples * kBoxHeight * kBoxWidth * kHopperRow;
  static constexpr int kSourceStride = (kSourceBytes + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kColumns * kHopperRow;  // of a stage of weights
  static_assert(kPatches % 2 == 0 && kRegistersOfSums <= 192, "the sums of a thread fit into its registers");
};
using HopperTile16x16 = HopperTile<2, 2, 1, 128, 2>;
using HopperTile16x16Wide = HopperTile<2, 2, 1, 192, 2>;
using HopperTile32x16 = HopperTile<4, 2, 1, 64, 2>;
using HopperTile8x8 = HopperTile<1, 1, 4, 128, 1>;
using HopperTile8x8Quarter = HopperTile<1, 1, 2, 64, 2>;
using HopperTile16x8Quarter = HopperTile<2, 1, 1, 64, 2>;  // of one sample

// What the producer tells the consumers about a tile.
struct HopperWork {
  int first, count;  // samples, or rows
  int y, x;          // its first pixel
  int column;        // its first channel of the result
  int expert;
  int depth;  // live channels of the source; 0 where no channel of the tile is live
  int live;   // live channels of the result, as far as its seam; -1: there are no more tiles
  int plane;  // of the result, in dgrad of the form of strides
};

// A group in shared memory, in the order in which tiles are handed out.
struct HopperGroup {
  int first, samples, expert, depth, live;
  int ends[3];  // of its tiles, in each of the classes of HopperSchedule
};

// Control data at the beginning of shared memory, before the groups.
struct HopperControl {
  unsigned long long source_full[kHopperSourceStages], source_empty[kHopperSourceStages];
  unsigned long long weights_full[kHopperMostWeightStages], weights_empty[kHopperMostWeightStages];
  unsigned long long message_full[kHopperMessages], message_empty[kHopperMessages];
  unsigned long long residual_full[8][2];  // of each warp's store buffers
  HopperWork messages[kHopperMessages];
};

// Dynamic shared memory: weights, sources, store buffers (all at multiples of 1024), control, groups.
template <class Tile>
constexpr int hopper_shared_bytes(int weight_stages, int num_groups) {
  return weight_stages * Tile::kWeightBytes + kHopperSourceStages * Tile::kSourceStride +
         8 * Tile::kStoreBuffers * kHopperStoreBytes + static_cast<int>(sizeof(HopperControl)) +
         num_groups * static_cast<int>(sizeof(HopperGroup));
}

// Forward and dgrad. In dgrad the source is dy, the result dx and dx2. Maps of what is absent have no address.
struct alignas(64) ConvHopperParams {
  TensorMap source, source2;  // boxes of a tile with the pixels around it
  TensorMap weight;           // boxes of 64 x 64 channels of one tap: (C_in, taps, C_out, experts)
  TensorMap result, result2;  // boxes of 8 x 2 pixels
  TensorMap residual;         // the same
  const void* bias;           // (experts, channels of the result) or null
  const void* sample_bias;    // (B, channels of the result) or null
  ConvRouting routing;
  int source_channels, result_channels;
  int source_seam, result_seam;                 // where the channels of source2, result2 begin, or all channels
  int rows_per_sample;                          // 1: tiles consist of samples
  int tiles_down, tiles_across, channel_tiles;  // of an image; of the channels of the result
  int weight_stages;
  int has_residual;
};

}  // namespace tdc
