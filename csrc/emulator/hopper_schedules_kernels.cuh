#pragma once

// What the schedules of Hopper's convolutions leave to each block, in clocks of a model: products at the tensor core's
// rate, for the rest of a tile what the planners count, and for that of a part of a unit as much as the test says. A
// patch of wgrad takes at least as long as its load. One thread walks as the producers of all blocks do.
#include "cuda/conv/hopper_images.cuh"
#include "cuda/conv/hopper_model.h"
#include "cuda/conv/hopper_rows.cuh"
#include "cuda/conv/hopper_strided.cuh"
#include "cuda/conv/hopper_wgrad.cuh"

namespace tdc {

// The parameters of a launch, and where its blocks' clocks go.
template <class Params>
struct alignas(64) ScheduleParams {
  Params launch;
  long long* clocks;  // (blocks)
  int blocks;
  int rest;  // clocks of a part of a unit besides its products; 0: products alone, of tiles, too
};

constexpr int kProductsOfClock = 2048, kLoadedInClock = 64;  // multiply-adds of an SM; bytes from the L2 cache

// The form of images as the form of rows has its layouts.
template <class Tile_, bool kForward_>
struct ScheduledImages {
  using Tile = Tile_;
  using Params = ConvHopperParams;
  using Schedule = HopperSchedule<Tile, Params>;
  static constexpr bool kForward = kForward_;
  const Params& p;

  __device__ explicit ScheduledImages(const Params& params) : p(params) {}
  __device__ static HopperWork find(const Schedule& schedule, int tile) { return schedule.find(tile); }
  __device__ static constexpr int copies() { return 1; }
  __device__ int taps(const HopperWork&) const { return kHopperTaps; }
  __device__ int rows(const HopperWork& work) const { return work.count * Tile::kPatches * 64 / Tile::kSamples; }
};

// The warps, of 16 rows each, of the block of a cluster that has the most of a tile's.
template <class Tile>
__device__ int most_warps(int rows) {
  int most = 0;
  for (int block = 0; block < Tile::kSplit; ++block) {
    int own = 0;
    for (int warp = 0; 16 * warp < rows; ++warp) own += HopperSplit<Tile>::owner_of(warp) == block ? 1 : 0;
    most = max(most, own);
  }
  return most;
}

// The blocks of a cluster take the same tiles and share their depth: a block stands for all of its cluster.
template <class Layout, int kSplit = 1>
__device__ void clocks_of_tiles(const ScheduleParams<typename Layout::Params>& p) {
  using Tile = typename Layout::Tile;
  TDC_DYNAMIC_SHARED(memory);
  typename Layout::Schedule schedule(p.launch, reinterpret_cast<HopperGroup*>(memory));
  schedule.template make<Layout::kForward>();
  if (threadIdx.x != 0) return;
  const Layout layout(p.launch);
  constexpr int kHalf = Tile::kPatches * 32;  // rows of a warpgroup
  for (int block = 0; block < p.blocks; ++block) {
    long long clocks = 0;
    HopperTurns<typename Layout::Schedule> turns(schedule, block, p.blocks, layout.taps({}), layout.copies());
    for (;;) {
      const HopperWork work = layout.find(schedule, turns.next());
      if (work.live < 0) break;
      const int columns = hopper_product_columns<Tile>(work), step = columns == Tile::kColumns ? 64 : kHalf;
      const long long rows = (layout.rows(work) + step - 1) / step * step, depth = (work.depth + 15) / 16 * 16;
      const int stored = 64 * min(2 * ((layout.rows(work) + 63) / 64), Tile::kPatches);
      int shared_rows = stored;
      if constexpr (kSplit > 1) shared_rows = 16 * kSplit * most_warps<Tile>(layout.rows(work));
      clocks += rows * depth * layout.taps(work) * columns / kProductsOfClock / kSplit +
                (p.rest ? conv::hopper_tile_clocks({stored, Tile::kColumns, 0}, kSplit, shared_rows) : 0);
    }
    p.clocks[block] = clocks;
  }
}

template <class Unit>
__device__ void clocks_of_parts(const ScheduleParams<ConvHopperWgradParams>& p) {
  TDC_DYNAMIC_SHARED(memory);
  HopperWgradSchedule<Unit> schedule(p.launch, reinterpret_cast<HopperWgradGroup*>(memory));
  schedule.make();
  if (threadIdx.x != 0) return;
  for (int block = 0; block < p.blocks; ++block) {
    long long clocks = 0;
    const bool works = block < schedule.parts();
    for (int at = works ? schedule.cut(block) : 0, end = works ? schedule.cut(block + 1) : 0; at < end;) {
      const HopperUnit unit = schedule.find(at);
      const HopperWgradGroup& first = schedule.group(unit.run);
      const int patches = schedule.patch_from(unit, end) - schedule.patch_from(unit, at);
      at = unit.begin + first.patches * unit.of_patch;
      if (patches == 0) continue;
      const int rows = first.expert_out - unit.out > 64 ? kHopperUnit : 64;
      const int columns = hopper_wgrad_columns<Unit>(first.expert_in - unit.in);
      const int taps = Unit::kOfRows ? 1 : Unit::kParts;
      const int products = 64 * rows * columns * taps / kProductsOfClock, loads = Unit::kStageBytes / kLoadedInClock;
      clocks += 1LL * patches * (p.rest ? max(products, loads) : products) + p.rest;
    }
    p.clocks[block] = clocks;
  }
}

#define TDC_SCHEDULE(name, Params, function) \
  TDC_DEFINE_KERNEL(schedule_##name, tdc::ScheduleParams<tdc::Params>, function, 64)
#define TDC_SCHEDULE_IMAGES(pass, tile, Tile, forward)                 \
  TDC_SCHEDULE(tdc_conv_hopper_##pass##_bf16_##tile, ConvHopperParams, \
               (tdc::clocks_of_tiles<tdc::ScheduledImages<tdc::Tile, forward>>))
#define TDC_SCHEDULE_ROWS(form, pass, tile, forward, Params, Layout)  \
  TDC_SCHEDULE(tdc_conv_hopper_##form##_##pass##_bf16_##tile, Params, \
               (tdc::clocks_of_tiles<tdc::Layout<tdc::HopperRows##tile, forward>>))
#define TDC_SCHEDULE_SPLIT(pass, split, forward)                                               \
  TDC_SCHEDULE(tdc_conv_hopper_rows_split##split##_##pass##_bf16_128x64, ConvHopperRowsParams, \
               (tdc::clocks_of_tiles<tdc::HopperRowsLayout<tdc::HopperRowsSplit##split##_128x64, forward>, split>))
#define TDC_SCHEDULE_PASS(pass, forward)                                                           \
  TDC_SCHEDULE_SPLIT(pass, 2, forward)                                                             \
  TDC_SCHEDULE_SPLIT(pass, 4, forward)                                                             \
  TDC_SCHEDULE_IMAGES(pass, 8x8x2x64, HopperTile8x8Quarter, forward)                               \
  TDC_SCHEDULE_IMAGES(pass, 16x8x64, HopperTile16x8Quarter, forward)                               \
  TDC_SCHEDULE_IMAGES(pass, 16x16x128, HopperTile16x16, forward)                                   \
  TDC_SCHEDULE_IMAGES(pass, 16x16x192, HopperTile16x16Wide, forward)                               \
  TDC_SCHEDULE_IMAGES(pass, 32x16x64, HopperTile32x16, forward)                                    \
  TDC_SCHEDULE_IMAGES(pass, 8x8x4x128, HopperTile8x8, forward)                                     \
  TDC_SCHEDULE_ROWS(rows, pass, 256x128, forward, ConvHopperRowsParams, HopperRowsLayout)          \
  TDC_SCHEDULE_ROWS(rows, pass, 128x128, forward, ConvHopperRowsParams, HopperRowsLayout)          \
  TDC_SCHEDULE_ROWS(rows, pass, 128x64, forward, ConvHopperRowsParams, HopperRowsLayout)           \
  TDC_SCHEDULE_ROWS(strided, pass, 256x128, forward, ConvHopperStridedParams, HopperStridedLayout) \
  TDC_SCHEDULE_ROWS(strided, pass, 128x128, forward, ConvHopperStridedParams, HopperStridedLayout) \
  TDC_SCHEDULE_ROWS(strided, pass, 128x64, forward, ConvHopperStridedParams, HopperStridedLayout)
#define TDC_SCHEDULE_WGRAD(unit, Unit) \
  TDC_SCHEDULE(tdc_conv_hopper_wgrad_##unit, ConvHopperWgradParams, (tdc::clocks_of_parts<tdc::Unit>))

TDC_SCHEDULE_PASS(forward, true)
TDC_SCHEDULE_PASS(dgrad, false)
TDC_SCHEDULE_WGRAD(bf16, HopperFilterUnit)
TDC_SCHEDULE_WGRAD(rows128_bf16, HopperRowsUnit<1>)
TDC_SCHEDULE_WGRAD(rows256_bf16, HopperRowsUnit<2>)
TDC_SCHEDULE_WGRAD(rows384_bf16, HopperRowsUnit<3>)

}  // namespace tdc
