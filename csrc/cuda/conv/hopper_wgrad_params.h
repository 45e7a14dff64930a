// What the Hopper form of wgrad receives, and the shared memory that host and device agree on.
#pragma once

#include "cuda/conv/hopper_params.h"

namespace tdc {

// The unit of work is 128 output channels of an expert times what a Unit below says. Its depth is the pixels of the
// expert's groups, a patch of 64 at a time. Two warpgroups have 64 output channels each; a thread sums kParts times 128
// columns.
constexpr int kHopperUnit = 128;
constexpr int kHopperPatch = 64 * kHopperRow;  // bytes of a box of dy; two make a stage's share

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
// the plane (hopper_strided_params.h) that the tap meets.
template <int kBlocks>
struct HopperRowsUnit {
  static constexpr bool kOfRows = true;
  static constexpr int kParts = kBlocks, kIn = 128 * kBlocks;
  static constexpr int kBoxes = 2 * kBlocks, kBoxBytes = kHopperPatch;
  static constexpr int kStageBytes = 2 * kHopperPatch + kBoxes * kBoxBytes;
};

constexpr int kHopperWgradMostStages = 6;
constexpr int kHopperWgradMostGroups = 256;
constexpr int kHopperReduceThreads = 256, kHopperReduceBlocks = 4;  // blocks of a unit
// Warps that sum dy for the bias, 64 channels each, and their first thread.
constexpr int kHopperBiasWarps = 2, kHopperBiasThread = 128 - 32 * kHopperBiasWarps;

// A thread's sums of a unit are quads; a part of a unit is those of the 256 threads that multiply, quad by quad.
template <class Unit>
constexpr int kHopperQuads = Unit::kParts * 16;
template <class Unit>
constexpr long long kHopperPartBytes = 16LL * kHopperQuads<Unit> * 256;

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
  int end;                    // of the group's share of the line of all work
};

// What counts of a stage. Aligned, as a multiplication by 12 takes registers that the producer has not.
struct alignas(16) HopperWgradStage {
  int live_out, pixels;
  int of_bias;  // the unit sums it for the bias
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
  TensorMap x, x2, dy;                          // x2 has no address where there is one input
  TensorMap x_even_odd, x_odd_even, x_odd_odd;  // of stride 2: planes by rows and columns, of which x is even, even
  void* dweight;                                // (experts, C_out, taps, C_in)
  void* parts;                                  // two of each block
  void* dbias;                                  // (experts, C_out)
  float* bias_sums;  // kHopperUnit of each part, then of each whole unit (hopper_wgrad_bias.cuh); null: none
  ConvRouting routing;
  int in_channels, out_channels, in_tiles, out_tiles;
  int seam;                          // no unit has input channels on both sides of it
  int patches_down, patches_across;  // of a sample, of 3x3 filters
  int patch_samples, patch_side;     // of stride 2: samples of a patch, lines and columns of it; else 0
  int pixels;                        // of a sample
  int taps, rows;                    // of the filter; its rows that units have, in the form of rows its taps
  int stages;
  int blocks;  // of the products
};

}  // namespace tdc
