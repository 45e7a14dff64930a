// The Hopper forms whose tiles are rows, forward and dgrad: a matrix product for every group and tap by TMA and wgmma,
// persistent blocks, warps with one task each, as in hopper_images.cuh.
//
//   producer     one thread: finds tiles, loads 64 channels of a tile's rows and of its weights into a ring of stages.
//                Stages of the next tile are loaded while this one is stored
//   consumers    two warpgroups: multiply half of a tile's rows each, add what is added, store
//
// Where the depth is split, the blocks of a cluster take the same tiles and other steps of them: hopper_split.cuh.
//
// A layout says where the rows lie in the tensors: in hopper_rows_layout.cuh, for 1x1 filters and small images, and in
// hopper_strided.cuh. Each tap has stages of its own: TMA loads the rows moved by it, with zeros around the images.
// With two inputs stages hold channels of one of them, so that the seam may be at any multiple of 8.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_rows_epilogue.cuh"
#include "cuda/conv/hopper_rows_layout.cuh"
#include "cuda/conv/hopper_rows_params.h"
#include "cuda/conv/hopper_schedule.cuh"
#include "cuda/conv/hopper_shared.cuh"
#include "cuda/conv/hopper_split.cuh"

namespace tdc {

// The live channels of a tile's source, block by block.
struct HopperDepths {
  int first, second, of_first;  // live channels of either input; blocks of the first

  __device__ __forceinline__ HopperDepths(int depth, int seam)
      : first(min(depth, seam)), second(depth - first), of_first(hopper_blocks(first)) {}

  __device__ __forceinline__ int blocks() const { return of_first + hopper_blocks(second); }
  __device__ __forceinline__ bool is_second(int block) const { return block >= of_first; }
  // A block's first channel, counted from its input's, and the live ones from there on.
  __device__ __forceinline__ int channel(int block) const {
    return (is_second(block) ? block - of_first : block) * kHopperDepth;
  }
  __device__ __forceinline__ int left(int block) const { return (is_second(block) ? second : first) - channel(block); }
};

// Loads everything. One thread.
template <class Layout>
class HopperRowsProducer {
  using Tile = typename Layout::Tile;
  using Params = typename Layout::Params;

 public:
  __device__ __forceinline__ HopperRowsProducer(const Params& p, const HopperRowsShared<Tile>& shared)
      : p_(p), layout_(p), shared_(shared), schedule_(p, shared.groups) {}

  __device__ __forceinline__ void run() {
    const int rank = HopperSplit<Tile>::rank();
    HopperTurns<typename Layout::Schedule> turns(schedule_, blockIdx.x, gridDim.x, layout_.taps({}), layout_.copies());
    for (;;) {
      const HopperWork work = layout_.find(schedule_, turns.next());
      send(work);
      if (work.live < 0) return;
      const HopperDepths depths(work.depth, layout_.source_seam());
      const int blocks = depths.blocks(), steps = layout_.taps(work) * blocks;
      if (steps == 0) continue;
      int step = HopperSplit<Tile>::first(steps, rank);
      const int end = HopperSplit<Tile>::first(steps, rank + 1);
      for (int tap = step / blocks, block = step % blocks; step < end; ++step) {
        load(work, depths, tap, block);
        if (++block == blocks) block = 0, ++tap;
      }
    }
  }

 private:
  __device__ __forceinline__ void send(const HopperWork& work) {
    HopperRowsControl& c = *shared_.control;
    if (!TDC_PLANTED(HOPPER_NO_MESSAGE_WAIT)) {
      mbarrier_wait(&c.message_empty[messages_.stage], messages_.parity ^ 1);
    }
    c.messages[messages_.stage] = work;
    mbarrier_arrive(&c.message_full[messages_.stage]);
    messages_.next(kHopperMessages);
  }

  __device__ __forceinline__ void load(const HopperWork& work, const HopperDepths& depths, int tap, int block) {
    HopperRowsControl& c = *shared_.control;
    const int boxes = hopper_weight_boxes<Tile>(work), stage = stages_.stage;
    if (!TDC_PLANTED(HOPPER_NO_EMPTY_WAIT)) {
      mbarrier_wait(&c.empty[stage], stages_.parity ^ (TDC_PLANTED(HOPPER_WRONG_PHASE) ? 0 : 1));
    }
    Mbarrier* full = &c.full[stage];
    mbarrier_arrive_expect(
        full, Tile::kSourceBytes + boxes * kHopperPatchBytes - (TDC_PLANTED(HOPPER_WRONG_BYTES) ? 128 : 0));
    const bool second = depths.is_second(block) && !TDC_PLANTED(HOPPER_WRONG_INPUT);
    const int channel = depths.channel(block);
    const int source = channel + (depths.is_second(block) ? layout_.source_seam() : 0);
    layout_.load_source(work, tap, second, channel, shared_.source(stage), full);
    const int of_filter = layout_.of_filter(work, tap) ^ (TDC_PLANTED(HOPPER_WRONG_TAP) && tap == 2 ? 1 : 0);
    for (int i = 0; i < boxes; ++i) {
      const int result = work.column + 64 * i;
      const int at[4] = {Layout::kForward ? source : result, of_filter, Layout::kForward ? result : source,
                         work.expert};
      tma_load(shared_.weight(stage) + i * kHopperPatchBytes, &p_.weight, full, at);
    }
    stages_.next(p_.stages);
  }

  const Params& p_;
  const Layout layout_;
  const HopperRowsShared<Tile>& shared_;
  typename Layout::Schedule schedule_;
  HopperRing stages_, messages_;
};

// One of the two warpgroups that multiply.
template <class T, class Layout>
class HopperRowsConsumer {
  using Tile = typename Layout::Tile;
  using Params = typename Layout::Params;
  using Epilogue = HopperRowsEpilogue<T, Layout>;
  static constexpr int kPatches = Tile::kPatches / 2;
  // Whether a tile may end after the first of the warpgroup's patches.
  static constexpr bool kMayHaveOne = kPatches == 2;
  using Sums = typename Epilogue::Sums;

 public:
  __device__ __forceinline__ HopperRowsConsumer(const Params& p, const HopperRowsShared<Tile>& shared, int group)
      : p_(p), layout_(p), shared_(shared), group_(group), warp_(shfl(static_cast<int>(threadIdx.x) / 32 % 4, 0)),
        split_(shared, 4 * group + warp_) {}

  __device__ __forceinline__ void run() {
    HopperRowsControl& c = *shared_.control;
    Epilogue epilogue(p_, shared_, group_);
    Sums sums;
    for (;;) {
      mbarrier_wait(&c.message_full[messages_.stage], messages_.parity);
      const HopperWork work = c.messages[messages_.stage];
      warp_sync();  // all lanes have read it
      hopper_release(&c.message_empty[messages_.stage]);
      messages_.next(kHopperMessages);
      if (work.live < 0) break;
      const bool own = Tile::kSplit == 1 || split_.own();
      if (own) epilogue.prepare(work);
      const HopperDepths depths(work.depth, layout_.source_seam());
      const int steps = layout_.taps(work) * depths.blocks(), rank = HopperSplit<Tile>::rank();
      const int first = HopperSplit<Tile>::first(steps, rank), end = HopperSplit<Tile>::first(steps, rank + 1);
      if (first < end) {
        if (group_ * kPatches * 64 >= layout_.rows(work)) {
          skip(end - first);
        } else if (const int columns = hopper_product_columns<Tile>(work); columns == Tile::kColumns) {
          if (kMayHaveOne && ((group_ * kPatches + 1) * 64 >= layout_.rows(work) || TDC_PLANTED(HOPPER_ONE_PATCH))) {
            multiply<Tile::kColumns, kMayHaveOne ? 1 : kPatches>(depths, first, end, sums);
          } else {
            multiply<Tile::kColumns, kPatches>(depths, first, end, sums);
          }
        } else if (columns == Tile::kThreeQuarters) {
          multiply<Tile::kThreeQuarters, kPatches>(depths, first, end, sums);
        } else {
          multiply<Tile::kHalf, kPatches>(depths, first, end, sums);
        }
      }
      if constexpr (Tile::kSplit > 1) {
        if (steps && group_ * 64 + warp_ * 16 < layout_.rows(work)) split_.combine(steps, sums[0]);
      }
      if (own) epilogue.finish(work, sums);
    }
    epilogue.end();
  }

 private:
  // The first kLive of the patches.
  template <int kColumns, int kLive>
  __device__ __forceinline__ void multiply(const HopperDepths& depths, int first, int end, Sums& sums) {
    HopperRowsControl& c = *shared_.control;
    last_ = -1;
    const int blocks = depths.blocks();
    int block = first % blocks;
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      const int left = depths.left(block);
      if (++block == blocks) block = 0;
      if (left > 48) {
        multiply_block<kColumns, kLive, kHopperSteps>(left, sums);
      } else if (left > 32) {
        multiply_block<kColumns, kLive, 3>(left, sums);
      } else if (left > 16) {
        multiply_block<kColumns, kLive, 2>(left, sums);
      } else {
        multiply_block<kColumns, kLive, 1>(left, sums);
      }
    }
    wgmma_wait<0>();
    if (!TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.empty[last_]);
#pragma unroll
    for (int i = 0; i < kLive; ++i) wgmma_settle(sums[i]);
  }

  // A stage, of which the first `live` channels count, in kSteps times 16.
  template <int kColumns, int kLive, int kSteps>
  __device__ __forceinline__ void multiply_block(int live, Sums& sums) {
    HopperRowsControl& c = *shared_.control;
    constexpr unsigned kHigh = descriptor_high(1024), kStepA = 32 >> 4;
    constexpr unsigned kStepB = (Layout::kForward ? 32 : 16 * kHopperRow) >> 4, kPatchStep = kHopperPatchBytes >> 4;
    const int stage = stages_.stage;
    if (!TDC_PLANTED(HOPPER_NO_FULL_WAIT)) mbarrier_wait(&c.full[stage], stages_.parity);
    if (layout_.reads_gradient() && live < 16 * kSteps) mask(stage, live);
    const unsigned first = descriptor_low(window(shared_.source(stage)) + group_ * kPatches * kHopperPatchBytes, 16);
    const unsigned a = first + (TDC_PLANTED(HOPPER_WRONG_OFFSET) ? kStepA : 0);
    const unsigned b = descriptor_low(window(shared_.weight(stage)), kHopperPatchBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < kLive; ++i) {
        wgmma<T, kColumns, 0, Layout::kForward ? 0 : 1>(sums[i], descriptor(a + i * kPatchStep + k * kStepA, kHigh),
                                                        descriptor(b + k * kStepB, kHigh), k ? 1 : last_ >= 0);
      }
    }
    wgmma_commit();
    if (TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.empty[stage]);
    wgmma_wait<1>();  // all but the products just issued
    if (last_ >= 0 && !TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.empty[last_]);
    last_ = stage;
    stages_.next(p_.stages);
  }

  __device__ __forceinline__ static unsigned window(const unsigned char* operand) {
    const unsigned window = shared_window(operand);
    return Tile::kSplit > 1 && !TDC_PLANTED(HOPPER_RANK_IN_OPERAND) ? own_window(window) : window;
  }

  // The warpgroup has no rows in this tile.
  __device__ __forceinline__ void skip(int steps) {
    HopperRowsControl& c = *shared_.control;
    for (int i = 0; i < steps; ++i) {
      mbarrier_wait(&c.full[stages_.stage], stages_.parity);
      warp_sync();
      hopper_release(&c.empty[stages_.stage]);
      stages_.next(p_.stages);
    }
  }

  // Zeros in the channels past `live` of the warpgroup's rows: x is zero there, a gradient may hold anything.
  __device__ __forceinline__ void mask(int stage, int live) {
    unsigned char* rows = shared_.source(stage) + group_ * kPatches * kHopperPatchBytes;
    hopper_clear<128>(rows, kPatches * 64, threadIdx.x % 128, live);
    if (!TDC_PLANTED(HOPPER_NO_ASYNC_FENCE)) async_fence();
    if (!TDC_PLANTED(HOPPER_NO_MASK_BARRIER)) named_barrier_sync(1 + group_, 128);
  }

  const Params& p_;
  const Layout layout_;
  const HopperRowsShared<Tile>& shared_;
  int group_, warp_;
  // The stage that the products under way read; -1: there are none yet, and the next overwrite the sums.
  int last_ = -1;
  HopperRing stages_, messages_;
  HopperSplit<Tile> split_;
};

template <class T, class Layout>
__device__ __forceinline__ void conv_hopper_rows(const typename Layout::Params& p) {
#ifdef TDC_SM90A
  using Tile = typename Layout::Tile;
  TDC_DYNAMIC_SHARED_1024(memory);
  const HopperRowsShared<Tile> shared(memory, p.stages);
  const int group = shfl(static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) shared.init_barriers(p.stages);
  if (threadIdx.x == 32) {
    Layout(p).prefetch_maps();
    tensor_map_prefetch(&p.weight);
  }
  // Ends with a barrier, also for the barriers.
  typename Layout::Schedule(p, shared.groups).template make<Layout::kForward>();
  if (Tile::kSplit > 1 && !TDC_PLANTED(HOPPER_NO_CLUSTER_BEGIN)) cluster_arrive(), cluster_wait();
  if (group == 0) {
    registers_give<56>();
    if (threadIdx.x == 0) HopperRowsProducer<Layout>(p, shared).run();
  } else {
    registers_take<224>();
    HopperRowsConsumer<T, Layout>(p, shared, group - 1).run();
  }
  if (Tile::kSplit > 1 && !TDC_PLANTED(HOPPER_NO_CLUSTER_END)) {
    warp_sync();  // one thread of its warp was the producer
    cluster_arrive(), cluster_wait();
  }
#else
  trap();
#endif
}

}  // namespace tdc
