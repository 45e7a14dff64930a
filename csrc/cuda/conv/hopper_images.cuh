// The Hopper form of forward and dgrad: TMA and wgmma, persistent blocks, warps with one task each.
//
//   producer        one thread: finds tiles, loads sources and weights into two rings of stages
//   consumers       two warpgroups: multiply half of a tile's patches each, add what is added, store
//
//   source stage    64 channels of a tile's pixels and those around it, loaded once: each tap reads it through
//                   descriptors that start at another pixel. What lies outside of the image arrives as zeros
//   weight stage    64 channels of one tap for the channels of the tile, read in place in both directions: k is their
//                   inner dimension in forward, the outer one in dgrad
//
// A patch is 8 x 8 pixels, the rows of one wgmma. Its rows of 8 pixels are one line of the source stage apart. With two
// inputs the depth is the channels of x, then those of x2, and a stage has channels of one of them.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_epilogue.cuh"
#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_schedule.cuh"
#include "cuda/conv/hopper_shared.cuh"

namespace tdc {

// Loads everything. One thread.
template <class Tile, bool kForward>
class HopperProducer {
 public:
  __device__ __forceinline__ HopperProducer(const ConvHopperParams& p, const HopperShared<Tile>& shared)
      : p_(p), shared_(shared), schedule_(p, shared.groups) {}

  __device__ __forceinline__ void run() {
    HopperTurns<HopperSchedule<Tile, ConvHopperParams>> turns(schedule_, blockIdx.x, gridDim.x, kHopperTaps);
    HopperWork work = schedule_.find(turns.next());
    for (;;) {
      send(work);
      if (work.live < 0) return;
      HopperWork next;
      for (int channel = 0, after;; channel = after) {
        after = hopper_next(channel, work.depth, p_.source_seam);
        if (work.depth) {
          load_source(work, channel);
          load_weights(work, channel, 0);
        }
        if (after == work.depth) {
          // While the consumers have taps to multiply. All blocks begin a tile at about the same time, which is more
          // than device memory can serve at once: the L2 cache has it by then.
          next = schedule_.find(turns.next());
          prefetch_source(next);
        }
        for (int tap = 1; work.depth && tap < kHopperTaps; ++tap) load_weights(work, channel, tap);
        if (after == work.depth) break;
      }
      work = next;
    }
  }

 private:
  __device__ __forceinline__ void send(const HopperWork& work) {
    HopperControl& c = *shared_.control;
    if (!TDC_PLANTED(HOPPER_NO_MESSAGE_WAIT)) {
      mbarrier_wait(&c.message_empty[messages_.stage], messages_.parity ^ 1);
    }
    c.messages[messages_.stage] = work;
    mbarrier_arrive(&c.message_full[messages_.stage]);
    messages_.next(kHopperMessages);
  }

  __device__ __forceinline__ void load_source(const HopperWork& work, int channel) {
    HopperControl& c = *shared_.control;
    mbarrier_wait(&c.source_empty[sources_.stage], sources_.parity ^ 1);
    Mbarrier* full = &c.source_full[sources_.stage];
    mbarrier_arrive_expect(full, Tile::kSourceBytes - (TDC_PLANTED(HOPPER_WRONG_BYTES) ? 128 : 0));
    const bool second = channel >= p_.source_seam;
    const int at[4] = {channel - (second ? p_.source_seam : 0), work.x - 1, work.y - 1, work.first};
    tma_load(shared_.source(sources_.stage), second && !TDC_PLANTED(HOPPER_WRONG_INPUT) ? &p_.source2 : &p_.source,
             full, at);
    sources_.next(kHopperSourceStages);
  }

  __device__ __forceinline__ void prefetch_source(const HopperWork& work) {
#pragma unroll 1
    for (int channel = 0; channel < work.depth; channel = hopper_next(channel, work.depth, p_.source_seam)) {
      const bool second = channel >= p_.source_seam;
      const int y = work.y - (TDC_PLANTED(HOPPER_WRONG_PREFETCH) ? 2 : 1);
      const int at[4] = {channel - (second ? p_.source_seam : 0), work.x - 1, y, work.first};
      tma_prefetch(second ? &p_.source2 : &p_.source, at);
    }
  }

  // In dgrad tap t of dx is tap 8 - t of the filter.
  __device__ __forceinline__ void load_weights(const HopperWork& work, int channel, int tap) {
    HopperControl& c = *shared_.control;
    const int boxes = hopper_weight_boxes<Tile>(work);
    if (!TDC_PLANTED(HOPPER_NO_EMPTY_WAIT)) {
      mbarrier_wait(&c.weights_empty[weights_.stage], weights_.parity ^ (TDC_PLANTED(HOPPER_WRONG_PHASE) ? 0 : 1));
    }
    Mbarrier* full = &c.weights_full[weights_.stage];
    mbarrier_arrive_expect(full, boxes * kHopperPatchBytes);
    unsigned char* to = shared_.weight(weights_.stage);
    const int of_filter =
        (kForward ? tap : kHopperTaps - 1 - tap) ^ (TDC_PLANTED(HOPPER_WRONG_TAP) && tap == 2 ? 1 : 0);
    for (int i = 0; i < boxes; ++i) {
      const int result = work.column + 64 * i;
      const int at[4] = {kForward ? channel : result, of_filter, kForward ? result : channel, work.expert};
      tma_load(to + i * kHopperPatchBytes, &p_.weight, full, at);
    }
    weights_.next(p_.weight_stages);
  }

  const ConvHopperParams& p_;
  const HopperShared<Tile>& shared_;
  HopperSchedule<Tile, ConvHopperParams> schedule_;
  HopperRing sources_, weights_, messages_;
};

// One of the two warpgroups that multiply.
template <class T, class Tile, bool kForward>
class HopperConsumer {
  static constexpr int kPatches = Tile::kPatches / 2;
  // Whether a tile may end after the first of the warpgroup's patches.
  static constexpr bool kMayHaveOne = kPatches == 2 && Tile::kSamples == Tile::kPatches;
  using Sums = typename HopperEpilogue<T, Tile>::Sums;

 public:
  __device__ __forceinline__ HopperConsumer(const ConvHopperParams& p, const HopperShared<Tile>& shared, int group)
      : p_(p), shared_(shared), group_(group) {
#pragma unroll
    for (int i = 0; i < kPatches; ++i) {
      const HopperPatch patch = HopperPatch::of<Tile>(group, i);
      patches_[i] = ((patch.sample * Tile::kBoxHeight + patch.y) * Tile::kBoxWidth + patch.x) * kHopperRow;
    }
  }

  __device__ __forceinline__ void run() {
    HopperControl& c = *shared_.control;
    HopperEpilogue<T, Tile> epilogue(p_, shared_, group_);
    // Never cleared: a tile's first products overwrite them.
    Sums sums;
#pragma unroll
    for (int i = 0; i < kPatches; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns / 2; ++j) sums[i][j] = 0.0f;
    }
    for (;;) {
      mbarrier_wait(&c.message_full[messages_.stage], messages_.parity);
      const HopperWork work = c.messages[messages_.stage];
      warp_sync();
      hopper_release(&c.message_empty[messages_.stage]);
      messages_.next(kHopperMessages);
      if (work.live < 0) break;
      epilogue.prepare(work);
      if (work.depth) {
        if (HopperPatch::of<Tile>(group_, 0).sample >= work.count) {
          skip(work);
        } else if (const int columns = hopper_product_columns<Tile>(work); columns == Tile::kColumns) {
          if (kMayHaveOne && (HopperPatch::of<Tile>(group_, 1).sample >= work.count || TDC_PLANTED(HOPPER_ONE_PATCH))) {
            multiply<Tile::kColumns, kMayHaveOne ? 1 : kPatches>(work, sums);
          } else {
            multiply<Tile::kColumns, kPatches>(work, sums);
          }
        } else if (columns == Tile::kThreeQuarters) {
          multiply<Tile::kThreeQuarters, kPatches>(work, sums);
        } else {
          multiply<Tile::kHalf, kPatches>(work, sums);
        }
      }
      epilogue.finish(work, sums);
    }
    epilogue.end();
  }

 private:
  // Which stages the products under way read.
  struct UnderWay {
    unsigned begun = 0;  // 0: there are none yet, and the next ones overwrite the sums
    int source = 0, weights = 0;
  };

  // The first kLive of the patches.
  template <int kColumns, int kLive>
  __device__ __forceinline__ void multiply(const HopperWork& work, Sums& sums) {
    UnderWay under_way;
#pragma unroll 1
    for (int channel = 0; channel < work.depth;) {
      const int left = hopper_end(channel, work.depth, p_.source_seam) - channel;
      channel += min(left, kHopperDepth);
      if (left > 48) {
        multiply_block<kColumns, kLive, kHopperSteps>(left, sums, under_way);
      } else if (left > 32) {
        multiply_block<kColumns, kLive, 3>(left, sums, under_way);
      } else if (left > 16) {
        multiply_block<kColumns, kLive, 2>(left, sums, under_way);
      } else {
        multiply_block<kColumns, kLive, 1>(left, sums, under_way);
      }
    }
    wgmma_wait<0>();
    HopperControl& c = *shared_.control;
    if (!TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.weights_empty[under_way.weights]);
    hopper_release(&c.source_empty[under_way.source]);
#pragma unroll
    for (int i = 0; i < kLive; ++i) wgmma_settle(sums[i]);
  }

  // All taps of one source stage, of which the first `live` channels count, in kSteps times 16.
  template <int kColumns, int kLive, int kSteps>
  __device__ __forceinline__ void multiply_block(int live, Sums& sums, UnderWay& under_way) {
    HopperControl& c = *shared_.control;
    constexpr unsigned kHighA = descriptor_high(Tile::kBoxWidth * kHopperRow), kHighB = descriptor_high(1024);
    constexpr unsigned kStepA = 32 >> 4, kStepB = (kForward ? 32 : 16 * kHopperRow) >> 4;
    mbarrier_wait(&c.source_full[sources_.stage], sources_.parity);
    if (!kForward && live < 16 * kSteps) mask(live);
    unsigned from = shared_window(shared_.source(0)) + sources_.stage * Tile::kSourceStride;
    int across = 0;
    for (int tap = 0; tap < kHopperTaps; ++tap) {
      if (!TDC_PLANTED(HOPPER_NO_FULL_WAIT)) mbarrier_wait(&c.weights_full[weights_.stage], weights_.parity);
      const unsigned low_b =
          descriptor_low(shared_window(shared_.weight(0)) + weights_.stage * Tile::kWeightBytes, kHopperPatchBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < kLive; ++i) {
          wgmma<T, kColumns, 0, kForward ? 0 : 1>(
              sums[i], descriptor(descriptor_low(from + patches_[i], 16) + k * kStepA, kHighA),
              descriptor(low_b + k * kStepB, kHighB), k ? 1 : under_way.begun);
        }
      }
      wgmma_commit();
      if (TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.weights_empty[weights_.stage]);
      wgmma_wait<1>();  // all but the products just issued
      if (under_way.begun) {
        if (!TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.weights_empty[under_way.weights]);
        if (tap == 0) hopper_release(&c.source_empty[under_way.source]);
      }
      under_way.begun = 1;
      under_way.source = sources_.stage, under_way.weights = weights_.stage;
      weights_.next(p_.weight_stages);
      from += kHopperRow;
      if (++across == 3) {
        across = 0;
        from += (Tile::kBoxWidth - (TDC_PLANTED(HOPPER_WRONG_LINE) ? 2 : 3)) * kHopperRow;
      }
    }
    sources_.next(kHopperSourceStages);
  }

  // The warpgroup has no samples in this tile.
  __device__ __forceinline__ void skip(const HopperWork& work) {
    HopperControl& c = *shared_.control;
    for (int channel = 0; channel < work.depth; channel = hopper_next(channel, work.depth, p_.source_seam)) {
      mbarrier_wait(&c.source_full[sources_.stage], sources_.parity);
      const int left = hopper_end(channel, work.depth, p_.source_seam) - channel;
      if (!kForward && left < kHopperDepth && left % 16) mask(left);
      warp_sync();
      hopper_release(&c.source_empty[sources_.stage]);
      sources_.next(kHopperSourceStages);
      for (int tap = 0; tap < kHopperTaps; ++tap) {
        mbarrier_wait(&c.weights_full[weights_.stage], weights_.parity);
        warp_sync();
        hopper_release(&c.weights_empty[weights_.stage]);
        weights_.next(p_.weight_stages);
      }
    }
  }

  // Zeros in the channels past `live` of the source stage, as far as the last 16 that are multiplied reach: x is zero
  // there, a gradient may hold anything. Both warpgroups share the pixels and wait for each other.
  __device__ __forceinline__ void mask(int live) {
    hopper_clear<256>(shared_.source(sources_.stage), Tile::kSourceBytes / kHopperRow, threadIdx.x % 256, live);
    if (!TDC_PLANTED(HOPPER_NO_ASYNC_FENCE)) async_fence();
    if (!TDC_PLANTED(HOPPER_NO_MASK_BARRIER)) named_barrier_sync(1, 256);
  }

  const ConvHopperParams& p_;
  const HopperShared<Tile>& shared_;
  int group_;
  unsigned patches_[kPatches];  // where they begin in a source stage
  HopperRing sources_, weights_, messages_;
};

template <class T, class Tile, bool kForward>
__device__ __forceinline__ void conv_hopper_images(const ConvHopperParams& p) {
#ifdef TDC_SM90A
  TDC_DYNAMIC_SHARED_1024(memory);
  const HopperShared<Tile> shared(memory, p.weight_stages);
  const int group = shfl(static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) shared.init_barriers(p.weight_stages);
  if (threadIdx.x == 32) {
    tensor_map_prefetch(&p.source);
    tensor_map_prefetch(&p.weight);
    tensor_map_prefetch(&p.result);
    if (p.has_residual) tensor_map_prefetch(&p.residual);
  }
  HopperSchedule<Tile, ConvHopperParams>(p, shared.groups)
      .template make<kForward>();  // ends with a barrier, also for the barriers
  if (group == 0) {
    registers_give<56>();
    if (threadIdx.x == 0) HopperProducer<Tile, kForward>(p, shared).run();
  } else {
    registers_take<224>();
    HopperConsumer<T, Tile, kForward>(p, shared, group - 1).run();
  }
#else
  trap();
#endif
}

}  // namespace tdc
