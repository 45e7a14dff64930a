// What the Hopper form of wgrad receives, and the shared memory that host and device agree on.
#pragma once

#include "cuda/conv/hopper_params.h"

namespace tdc {

// The unit of work is 128 output channels x 128 input channels of one filter row of an expert: three taps. Its depth is
// the pixels of the expert's groups, a patch of 8 x 8 at a time.
constexpr int kHopperUnit = 128, kHopperUnitTaps = 3;
constexpr int kHopperPatch = 64 * kHopperRow;                               // bytes of a box of dy
constexpr int kHopperWidePatch = 80 * kHopperRow;                           // of x: a pixel more on either side
constexpr int kHopperWgradStage = 2 * kHopperPatch + 2 * kHopperWidePatch;  // two boxes of each
constexpr int kHopperWgradMostStages = 6;
constexpr int kHopperWgradMostGroups = 256;
constexpr int kHopperReduceThreads = 256, kHopperReduceBlocks = 4;  // blocks of a unit

// A thread's 192 sums of a unit are 48 quads; a part of a unit is those of the 256 threads that multiply, quad by quad.
constexpr int kHopperQuads = kHopperUnitTaps * 16;
constexpr long long kHopperPartBytes = 16LL * kHopperQuads * 256;

// A part of a unit's depth.
struct HopperWgradWork {
  int expert;  // -1: there is no more work
  int row, in, out;
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

struct HopperWgradControl {
  unsigned long long full[kHopperWgradMostStages], empty[kHopperWgradMostStages];
  unsigned long long message_full[kHopperMessages], message_empty[kHopperMessages];
  HopperWgradWork messages[kHopperMessages];
  int live[kHopperWgradMostStages][2];  // channels of x and of dy in a stage that count, of 128
};

constexpr int hopper_wgrad_shared_bytes(int stages, int num_groups) {
  return stages * kHopperWgradStage + static_cast<int>(sizeof(HopperWgradControl)) +
         num_groups * static_cast<int>(sizeof(HopperWgradGroup));
}

struct alignas(64) ConvHopperWgradParams {
  TensorMap x, dy;
  void* dweight;  // (experts, C_out, 3, 3, C_in)
  void* parts;    // two of each block
  ConvRouting routing;
  int in_channels, out_channels, in_tiles, out_tiles;
  int patches_down, patches_across;
  int stages;
  int blocks;  // of the products
};

}  // namespace tdc
