// What the Hopper form of rows receives, and the tiles and shared memory that host and device agree on.
#pragma once

#include "cuda/conv/hopper_params.h"

namespace tdc {

// The form of rows serves 1x1 filters, and 3x3 filters on images of few pixels: a matrix product for every group and
// tap, whose rows are the pixels of the group's samples. A tile is kPatches times 64 rows, the rows of one wgmma, times
// kColumns channels of the result; two warpgroups multiply half of the rows each. Where a result has fewer tiles than
// there are SMs, the depth is split: a cluster of kSplit blocks computes a tile, each a part of the taps and channels,
// and the rows of each warp are added up and stored by one of them (hopper_split.cuh).
template <int kPatches_, int kColumns_, int kSplit_ = 1>
struct HopperRowsTile {
  static constexpr int kDown = 1, kAcross = 1;
  static constexpr int kPatches = kPatches_, kSamples = 64 * kPatches_, kColumns = kColumns_;
  static constexpr int kThreeQuarters = hopper_three_quarters(kColumns, 64), kHalf = hopper_half(kColumns, 64);
  static constexpr int kStoreBuffers = 2;  // of each warp: 16 rows of 64 channels
  static constexpr int kSourceBytes = kSamples * kHopperRow, kWeightBytes = kColumns * kHopperRow;
  static constexpr int kStageBytes = kSourceBytes + kWeightBytes;
  static constexpr int kSplit = kSplit_;
  // The sums of a warp, and those that the other blocks send to the warps of one.
  static constexpr int kWarpSumBytes = 16 * kColumns * 4;
  static constexpr int kPartBytes = (kSplit - 1) * (8 / kSplit) * kWarpSumBytes;
  static_assert(kPatches % 2 == 0 && kPatches / 2 * kColumns / 2 <= 192, "the sums of a thread fit into its registers");
  static_assert(8 % kSplit == 0 && (kSplit == 1 || kPatches == 2), "a block adds up the rows of whole warps, 16 each");
};
using HopperRows256x128 = HopperRowsTile<4, 128>;
using HopperRows128x128 = HopperRowsTile<2, 128>;
using HopperRows128x64 = HopperRowsTile<2, 64>;
using HopperRowsSplit2_128x64 = HopperRowsTile<2, 64, 2>;
using HopperRowsSplit4_128x64 = HopperRowsTile<2, 64, 4>;

constexpr int kHopperRowsMostStages = 6;

struct HopperRowsControl {
  unsigned long long full[kHopperRowsMostStages], empty[kHopperRowsMostStages];
  unsigned long long message_full[kHopperMessages], message_empty[kHopperMessages];
  unsigned long long residual_full[8][2];          // of each warp's store buffers
  unsigned long long part_full[8], part_empty[8];  // of each warp's sums, where the depth is split
  HopperWork messages[kHopperMessages];
};

// Dynamic shared memory: stages, store buffers, sums of other blocks (all at multiples of 1024), control, groups.
template <class Tile>
constexpr int hopper_rows_shared_bytes(int stages, int num_groups) {
  return stages * Tile::kStageBytes + 8 * Tile::kStoreBuffers * kHopperStoreBytes + Tile::kPartBytes +
         static_cast<int>(sizeof(HopperRowsControl)) + num_groups * static_cast<int>(sizeof(HopperGroup));
}

// Forward and dgrad. In dgrad the source is dy, the result dx and dx2. Maps of what is absent have no address.
struct alignas(64) ConvHopperRowsParams {
  TensorMap source, source2;          // boxes of a tile: (channels, rows)
  TensorMap weight;                   // boxes of 64 x 64 channels: (C_in, taps, C_out, experts)
  TensorMap result, result2;          // boxes of 16 rows
  TensorMap result_row, result2_row;  // of one row
  TensorMap residual;                 // of 16 rows
  const void* bias;                   // (experts, channels of the result) or null
  const void* sample_bias;            // (B, channels of the result) or null
  ConvRouting routing;
  int source_channels, result_channels;
  int source_seam, result_seam;                 // where the channels of source2, result2 begin, or all channels
  int rows_per_sample;                          // pixels
  FastDivisor by_rows;                          // of a sample
  int tiles_down, tiles_across, channel_tiles;  // 1, 1; of the channels of the result
  int taps;                                     // 1, or 9 of 3x3 filters with padding 1
  int stages;
  int has_residual;
};

}  // namespace tdc
