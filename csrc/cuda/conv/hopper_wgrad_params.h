// What the Hopper form of wgrad receives, and the shared memory that host and device agree on.
#pragma once

#include "cuda/conv/hopper_params.h"

namespace tdc {

// The unit of work is 128 output channels of an expert times what a Unit below says. Its depth is the pixels of the
// expert's groups, a patch of 64 at a time. Two warpgroups have 64 output channels each; a thread sums kParts times 128
// columns.
constexpr int kHopperUnit = 128;
constexpr int kHopperPatchRows = 64;
constexpr int kHopperPatch = kHopperPatchRows * kHopperRow;  // bytes of a box of dy; two make a stage's share

// 3x3 filters: 128 input channels of one filter row, three taps of them. A patch is 8 x 8 pixels, a box of x a pixel
// wider on either side.
struct HopperFilterUnit {
  static constexpr bool kOfRows = false;
  static constexpr int kParts = 3, kIn = 128;
  static constexpr int kBoxes = 2, kBoxBytes = 80 * kHopperRow;  // of x
  static constexpr int kStageBytes = 2 * kHopperPatch + kBoxes * kBoxBytes;
};

// The form of rows: one tap, kBlocks times 128 input channels of one input. A patch is 64 pixels of a group, one after
// the other. With stride 2 it is 8 x 8 pixels of a sample or 4 x 4 of four samples of a group, and those of x come from
// the plane (hopper_strided_params.h) that the tap meets. With upsampling it is such pixels of x, and what stands for
// dy comes from a plane of its window sums (window_sums.cuh).
template <int kBlocks>
struct HopperRowsUnit {
  static constexpr bool kOfRows = true;
  static constexpr int kParts = kBlocks, kIn = 128 * kBlocks;
  static constexpr int kBoxes = 2 * kBlocks, kBoxBytes = kHopperPatch;
  static constexpr int kStageBytes = 2 * kHopperPatch + kBoxes * kBoxBytes;
};

constexpr int kHopperWgradMostStages = 6;
constexpr int kHopperWgradMostGroups = 256;
// Threads of the second kernel; equal slices of a unit, which its blocks share, and blocks per SM, at most.
constexpr int kHopperReduceThreads = 256, kHopperReduceSlices = 16, kHopperReduceBlocks = 3;
// Warps that sum dy for the bias, 64 channels each, and their first thread.
constexpr int kHopperBiasWarps = 2, kHopperBiasThread = 128 - 32 * kHopperBiasWarps;

// A thread's sums of a unit are quads; a part of a unit is those of the 256 threads that multiply, quad by quad.
template <class Unit>
constexpr int kHopperQuads = Unit::kParts * 16;
template <class Unit>
constexpr long long kHopperPartBytes = 16LL * kHopperQuads<Unit> * 256;

// Times in which the line of all work is counted, 64 clocks each. Of a unit's end, in which its sums leave the
// registers: about 2700 clocks (measured in a prototype of the forward, between tiles). Of a patch: its products, 2048
// in a clock, at most those of all channels of the unit; at least those in which 64 bytes per clock load it.
constexpr int kHopperUnitEnd = 42;
// What cuts anywhere in the line cost more than those that divide all units into equal parts, or none: 34,000 clocks
// (in a prototype on an H200, 132 blocks against 96 or 120: 12 to 20 us more than their products say).
constexpr int kHopperCuts = 530;
template <class Unit>
constexpr int kHopperMostPatch = 64 * kHopperUnit * Unit::kParts * 128 / 2048 / 64;
template <class Unit>
constexpr int kHopperLeastPatch = Unit::kStageBytes / 64 / 64;

// A part of a unit's depth.
struct HopperWgradWork {
  int expert;             // -1: there is no more work
  int row, in, out;       // a filter row or a tap
  int live_in, live_out;  // of the expert, counted from the unit's first channels
  int patches;            // that are multiplied
  int slot;               // where the part goes; -1: it is the whole unit
};

// A group in shared memory, in the order of its expert.
struct HopperWgradGroup {
  int first, samples, expert, live_in, live_out;
  int before;                 // patches of earlier groups of the expert
  int run;                    // the first group of the expert
  int patches;                // of all groups of the expert
  int expert_in, expert_out;  // the largest widths of them
  int shared;                 // there are several
  int end;                    // of the expert's share of the line of all work
  int length;                 // of the units of 128 output channels in it, if all of these are live
  // Of the first group in the list: what a unit takes of the line before its patches; parts of the line.
  int unit_end, parts;
};

// What counts of a stage. Aligned, as a multiplication by 12 takes registers that the producer has not.
struct alignas(16) HopperWgradStage {
  int live_out, pixels;
  int first_row;  // of dy, of which a sample has sample_rows
};

struct HopperWgradControl {
  unsigned long long full[kHopperWgradMostStages], empty[kHopperWgradMostStages];
  unsigned long long message_full[kHopperMessages], message_empty[kHopperMessages];
  HopperWgradWork messages[kHopperMessages];
  HopperWgradStage stages[kHopperWgradMostStages];
};

constexpr int hopper_wgrad_shared_bytes(int stage_bytes, int stages, int num_groups) {
  return stages * stage_bytes + static_cast<int>(sizeof(HopperWgradControl)) +
         num_groups * static_cast<int>(sizeof(HopperWgradGroup));
}

struct alignas(64) ConvHopperWgradParams {
  TensorMap x, x2, dy;  // x2 has no address where there is one input
  // Planes by rows and columns, of which x is even, even with stride 2, dy with upsampling, where it is the window
  // sums.
  TensorMap even_odd, odd_even, odd_odd;
  void* dweight;       // (experts, C_out, taps, C_in)
  void* parts;         // two of each block
  void* dbias;         // (experts, C_out) or null
  void* dsample_bias;  // (B, C_out) or null
  float* bias_sums;    // what this kernel sums for biases (hopper_wgrad_bias.cuh); null: nothing
  float* sample_sums;  // (sample_parts, B, out_tiles * kHopperUnit): sums of each sample; null: biases need none
  ConvRouting routing;
  int in_channels, out_channels, in_tiles, out_tiles;
  int seam;                                  // no unit has input channels on both sides of it
  int patches_down, patches_across;          // of a sample, of 3x3 filters
  int patch_samples, patch_side;             // of patches that are boxes of the form of rows; else 0
  int upsampled;                             // these are of x, and dy has planes
  int sample_rows;                           // of dy, of a sample
  FastDivisor by_sample_rows, by_turn_rows;  // rows of dy that a filter row or tap sums for biases before the next
  int sample_parts;                          // sums that make up that of a sample
  int pixels;                                // of a sample
  int taps, rows;                            // of the filter; its rows that units have, in the form of rows its taps
  int stages;
  int blocks, equal_parts;  // of the products; parts where all units are as large
};

// Sums of dy over all windows of 2 x 2 pixels, and over the samples: window_sums.cuh.
constexpr int kWindowSumThreads = 256, kWindowSumChunks = 8;  // chunks of 8 channels of a block
struct ConvWindowSumParams {
  const void* dy;
  void* windows;       // (B, height + 1, width + 1, channels)
  float* sample_sums;  // (strips, B, pitch) or null
  ConvRouting routing;
  FastDivisor by_columns;  // width + 1
  int height, width, channels;
  int strips, lines;  // of the windows of a sample; lines of a strip
  int channel_tiles, pitch;
};

}  // namespace tdc
