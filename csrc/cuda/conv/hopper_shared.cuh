// Shared memory of the Hopper form: where everything lies, and the rings of stages.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_params.h"

namespace tdc {

// Which stage is next, and the parity of the phase in which it is filled.
struct HopperRing {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Of a stage: the producer or its copies fill it, the warps of the consumers release it.
__device__ __forceinline__ void hopper_init_pair(Mbarrier* full, Mbarrier* empty, int warps = 8) {
  mbarrier_init(full, 1);
  mbarrier_init(empty, warps);
}

// Each warp for itself: nothing rests on the warps of a warpgroup being in step. Every lane must have passed its wait
// for the stage, or it may miss the phase: warp_sync or a product comes before.
__device__ __forceinline__ void hopper_release(Mbarrier* barrier) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

constexpr int kHopperPatchBytes = 64 * kHopperRow;  // 64 rows of a stage
constexpr int kHopperSteps = kHopperDepth / 16;     // products along the depth of a stage

__device__ __forceinline__ int hopper_blocks(int depth) { return (depth + kHopperDepth - 1) / kHopperDepth; }

// The depth is the channels of the first input, then those of the second, and no stage has channels of both: where the
// live ones of the input end that a channel belongs to, and where the stage after the channel's begins.
__device__ __forceinline__ int hopper_end(int channel, int depth, int seam) {
  return channel < seam ? min(depth, seam) : depth;
}
__device__ __forceinline__ int hopper_next(int channel, int depth, int seam) {
  return min(channel + kHopperDepth, hopper_end(channel, depth, seam));
}

// The first `live` of two 16-bit elements, zeros after them.
__device__ __forceinline__ unsigned hopper_keep(unsigned pair, int live) {
  return live >= 2 ? pair : live == 1 ? pair & 0xffffu : 0u;
}

// Zeros in the channels past `live` of rows that TMA has swizzled, as far as the last 16 that are multiplied reach.
template <int kThreads>
__device__ __forceinline__ void hopper_clear(unsigned char* rows, int count, int thread, int live) {
  if (TDC_PLANTED(HOPPER_NO_MASK)) return;
  for (int row = thread; row < count; row += kThreads) {
    for (int chunk = live / 8; chunk < (live + 15) / 16 * 2; ++chunk) {
      uint4* at = reinterpret_cast<uint4*>(rows + row * kHopperRow + (chunk ^ row % 8) * 16);
      uint4 words = load_16(at);
      words.x = hopper_keep(words.x, live - 8 * chunk), words.y = hopper_keep(words.y, live - 8 * chunk - 2);
      words.z = hopper_keep(words.z, live - 8 * chunk - 4), words.w = hopper_keep(words.w, live - 8 * chunk - 6);
      store_16(at, words);
    }
  }
}

template <class Tile>
struct HopperShared {
  unsigned char* stages;  // weights, then sources
  unsigned char* stores;
  int weight_stages;
  HopperControl* control;
  HopperGroup* groups;

  __device__ __forceinline__ HopperShared(unsigned char* memory, int number_of_weight_stages)
      : stages(memory), weight_stages(number_of_weight_stages) {
    stores = source(kHopperSourceStages);
    control = reinterpret_cast<HopperControl*>(stores + 8 * Tile::kStoreBuffers * kHopperStoreBytes);
    groups = reinterpret_cast<HopperGroup*>(control + 1);
  }

  __device__ __forceinline__ unsigned char* weight(int stage) const { return stages + stage * Tile::kWeightBytes; }
  __device__ __forceinline__ unsigned char* source(int stage) const {
    return stages + weight_stages * Tile::kWeightBytes + stage * Tile::kSourceStride;
  }
  __device__ __forceinline__ unsigned char* store(int warp, int buffer) const {
    return stores + (warp * Tile::kStoreBuffers + buffer) * kHopperStoreBytes;
  }

  // One thread.
  __device__ __forceinline__ void init_barriers(int number_of_weight_stages) const {
    for (int i = 0; i < kHopperSourceStages; ++i) hopper_init_pair(&control->source_full[i], &control->source_empty[i]);
    for (int i = 0; i < number_of_weight_stages; ++i)
      hopper_init_pair(&control->weights_full[i], &control->weights_empty[i]);
    for (int i = 0; i < kHopperMessages; ++i) hopper_init_pair(&control->message_full[i], &control->message_empty[i]);
    for (int warp = 0; warp < 8; ++warp) {
      for (int i = 0; i < Tile::kStoreBuffers; ++i) mbarrier_init(&control->residual_full[warp][i], 1);
    }
    mbarrier_init_fence();
  }
};

// Columns of the products of a tile, by its live channels: half of them, three quarters or all.
template <class Tile>
__device__ __forceinline__ int hopper_product_columns(const HopperWork& work) {
  const int live = work.live - work.column - (TDC_PLANTED(HOPPER_NARROW_COLUMNS) ? 1 : 0);
  return live <= Tile::kHalf ? Tile::kHalf : live <= Tile::kThreeQuarters ? Tile::kThreeQuarters : Tile::kColumns;
}
// Boxes of 64 columns that they read.
template <class Tile>
__device__ __forceinline__ int hopper_weight_boxes(const HopperWork& work) {
  return (hopper_product_columns<Tile>(work) + 63) / 64;
}

// The i-th patch of a warpgroup, as pixels and a sample of the tile.
struct HopperPatch {
  int sample, y, x;

  template <class Tile>
  __device__ __forceinline__ static HopperPatch of(int group, int i) {
    const int number = group * (Tile::kPatches / 2) + i;
    return {number / (Tile::kAcross * Tile::kDown), number / Tile::kAcross % Tile::kDown * 8,
            number % Tile::kAcross * 8};
  }
};

}  // namespace tdc
