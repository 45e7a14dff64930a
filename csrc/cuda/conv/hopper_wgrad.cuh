// The Hopper form of wgrad: dweight[co, tap, ci] = sum over the samples of an expert and their pixels of
// dy[pixel, co] x[its tap, ci], by TMA and wgmma.
//
//   producer      one thread: loads patches of dy and x into a ring of stages: hopper_wgrad_producer.cuh
//   consumers     two warpgroups: 64 output channels x the unit's taps or blocks of 128 input channels each
//   sums          two warps of the producer's warpgroup, where dbias is wanted: hopper_wgrad_bias.cuh
//
// Both operands have k, the pixels, as their outer dimension. A stage has the patch of dy and that of x in the filter's
// row, a pixel wider on either side: the three taps read it from another pixel on, as in hopper_images.cuh. In the form
// of rows it has 64 pixels of a group, and of x, moved by the unit's tap, one to three times 128 channels; so also with
// stride 2 and, where the window sums of dy stand for it (window_sums.cuh), with upsampling.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_wgrad_bias.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/hopper_wgrad_producer.cuh"
#include "cuda/conv/hopper_wgrad_schedule.cuh"
#include "cuda/conv/hopper_wgrad_shared.cuh"

namespace tdc {

// Rounds two sums into dweight; zeros where the channels are not live.
template <class T>
__device__ __forceinline__ void store_pair(T* at, float low, float high, int live) {
  *reinterpret_cast<unsigned*>(at) = pack<T>(live > 0 ? low : 0.0f, live > 1 ? high : 0.0f);
}

// One of the two warpgroups that multiply.
template <class T, class Unit>
class HopperWgradConsumer {
  static constexpr int kParts = Unit::kParts;
  using Sums = float[kParts][64];

 public:
  __device__ __forceinline__ HopperWgradConsumer(const ConvHopperWgradParams& p, const HopperWgradShared<Unit>& shared,
                                                 int group)
      : p_(p), shared_(shared), group_(group) {}

  __device__ __forceinline__ void run() {
    HopperWgradControl& c = *shared_.control;
    Sums sums;
#pragma unroll
    for (int t = 0; t < kParts; ++t) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[t][i] = 0.0f;
    }
    for (;;) {
      mbarrier_wait(&c.message_full[messages_.stage], messages_.parity);
      const HopperWgradWork& work = c.messages[messages_.stage];  // stays there, to spare registers
      if (work.expert < 0) return;
      multiply_live(work, sums);
      if (work.slot < 0) {
        store(work, sums);
      } else {
        store_part(work, sums);
      }
      warp_sync();
      hopper_release(&c.message_empty[messages_.stage]);
      messages_.next(kHopperMessages);
    }
  }

 private:
  // What no channel is live for is not multiplied: columns or blocks of input channels, or all output channels of the
  // warpgroup.
  __device__ __forceinline__ void multiply_live(const HopperWgradWork& work, Sums& sums) {
    const int patches = work.patches, columns = hopper_wgrad_columns<Unit>(work.live_in);
    if (64 * group_ >= work.live_out) {
      skip(patches);
    } else if constexpr (Unit::kIn > 128) {
      multiply_blocks<Unit::kIn>(columns, patches, sums);
    } else if (columns == 128) {
      multiply<128>(patches, sums);
    } else if (columns == 96) {
      multiply<96>(patches, sums);
    } else {
      multiply<64>(patches, sums);
    }
  }

  // So many columns at most, of blocks of 128 input channels.
  template <int kColumns>
  __device__ __forceinline__ void multiply_blocks(int columns, int patches, Sums& sums) {
    if constexpr (kColumns > 64) {
      if (columns < kColumns) {
        multiply_blocks<kColumns - 64>(columns, patches, sums);
        return;
      }
    }
    multiply<128, (kColumns + 127) / 128, kColumns % 128 ? 64 : 128>(patches, sums);
  }

  // The first kLive parts of the sums, kLast columns of the last of them.
  template <int kColumns, int kLive = kParts, int kLast = kColumns>
  __device__ __forceinline__ void multiply(int patches, Sums& sums) {
    HopperWgradControl& c = *shared_.control;
    constexpr int kLine = (Unit::kOfRows ? 8 : 10) * kHopperRow;  // eight pixels and what is beside them
    constexpr unsigned kHighA = descriptor_high(1024), kHighB = descriptor_high(kLine);
    constexpr unsigned kStepA = 16 * kHopperRow >> 4, kStepB = 2 * kLine >> 4;
    constexpr unsigned kPart = (Unit::kOfRows ? 2 * Unit::kBoxBytes : kHopperRow) >> 4;  // two boxes, or a pixel
    int last = 0;
    for (int i = 0; i < patches; ++i) {
      const int stage = stages_.stage;
      if (!TDC_PLANTED(HOPPER_NO_FULL_WAIT)) mbarrier_wait(&c.full[stage], stages_.parity);
      const bool ragged = shared_.is_ragged(stage);
      warp_sync();  // all lanes have read it before one releases the stage
      if (ragged) mask(stage);
      const unsigned a = descriptor_low(shared_window(shared_.dy(stage)) + group_ * kHopperPatch, 16);
      const unsigned b = descriptor_low(shared_window(shared_.x(stage)), Unit::kBoxBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 pixels
#pragma unroll
        for (int t = 0; t < kLive; ++t) {
          const unsigned part = (TDC_PLANTED(HOPPER_WRONG_TAP) ? 1 : t) * kPart;
          const auto of_dy = descriptor(a + k * kStepA, kHighA), of_x = descriptor(b + k * kStepB + part, kHighB);
          if (t < kLive - 1) {
            wgmma<T, kColumns, 1, 1>(sums[t], of_dy, of_x, k || i);
          } else {
            wgmma<T, kLast, 1, 1>(sums[t], of_dy, of_x, k || i);
          }
        }
      }
      wgmma_commit();
      if (TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.empty[stage]);
      wgmma_wait<1>();  // all but the products just issued
      if (i && !TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.empty[last]);
      last = stage;
      stages_.next(p_.stages);
    }
    wgmma_wait<0>();
    if (patches && !TDC_PLANTED(HOPPER_EARLY_RELEASE)) hopper_release(&c.empty[last]);
#pragma unroll
    for (int t = 0; t < kLive; ++t) wgmma_settle(sums[t]);
  }

  __device__ __forceinline__ void skip(int patches) {
    HopperWgradControl& c = *shared_.control;
    for (int i = 0; i < patches; ++i) {
      const int stage = stages_.stage;
      mbarrier_wait(&c.full[stage], stages_.parity);
      const bool ragged = shared_.is_ragged(stage);
      warp_sync();
      if (ragged) mask(stage);
      hopper_release(&c.empty[stage]);
      stages_.next(p_.stages);
    }
  }

  // Zeros in the channels of dy that the stage's group has not, as another group of the expert may have them: a
  // gradient may hold anything there, where x is zero. And in the pixels of other groups. All that read the stage wait
  // for each other.
  __device__ __forceinline__ void mask(int stage) {
    const HopperWgradStage& what = shared_.control->stages[stage];
    if (Unit::kOfRows) clear<Unit::kBoxes>(shared_.x(stage), Unit::kIn, what.pixels);
    clear<2>(shared_.dy(stage), what.live_out, what.pixels);
    if (!TDC_PLANTED(HOPPER_NO_ASYNC_FENCE)) async_fence();
    if (!TDC_PLANTED(HOPPER_NO_MASK_BARRIER)) hopper_wgrad_readers_sync(p_);
  }
  // Boxes of 64 channels, one after the other.
  template <int kBoxes>
  __device__ __forceinline__ static void clear(unsigned char* boxes, int live, int live_pixels) {
    if (TDC_PLANTED(HOPPER_NO_MASK)) return;
    for (int i = threadIdx.x - 128; i < kBoxes * 64 * 8; i += 256) {
      const int row = i / 8, chunk = i % 8;
      int left = live - row / 64 * 64 - chunk * 8;  // live channels of the chunk
      if (Unit::kOfRows && row % 64 >= live_pixels) left = 0;
      if (left >= 8) continue;
      uint4* at = reinterpret_cast<uint4*>(boxes + row * kHopperRow + (chunk ^ row % 8) * 16);
      uint4 words = left > 0 ? load_16(at) : make_uint4(0, 0, 0, 0);
      words.x = hopper_keep(words.x, left), words.y = hopper_keep(words.y, left - 2);
      words.z = hopper_keep(words.z, left - 4), words.w = hopper_keep(words.w, left - 6);
      store_16(at, words);
    }
  }

  // The whole unit. Offsets that the compiler knows: 48 addresses do not fit beside the sums.
  __device__ __forceinline__ void store(const HopperWgradWork& work, const Sums& sums) {
    const int thread = threadIdx.x - 128, lane = thread % 32;
    const int co = thread / 32 * 16 + lane / 4, ci = lane % 4 * 2;
    const int end = work.in < p_.seam ? p_.seam : p_.in_channels;
    const int live = work.live_in - ci, left = end - work.in - ci;
    const bool upper = work.out + co < p_.out_channels, lower = work.out + co + 8 < p_.out_channels;
    const bool live_upper = co < work.live_out && work.patches, live_lower = co + 8 < work.live_out && work.patches;
    const long long line =
        static_cast<long long>(Unit::kOfRows ? p_.taps : 9) * p_.in_channels;  // from an output channel to the next
    T* at = static_cast<T*>(p_.dweight) +
            (static_cast<long long>(work.expert) * p_.out_channels + work.out + co) * line +
            static_cast<long long>(work.row) * (Unit::kOfRows ? 1 : 3) * p_.in_channels + work.in + ci;
#pragma unroll
    for (int t = 0; t < kParts; ++t, at += Unit::kOfRows ? 128 : p_.in_channels) {
      const int before = Unit::kOfRows ? 128 * t : 0;  // input channels of earlier parts
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (before + 8 * j >= left) continue;
        const float* quad = sums[t] + 4 * j;
        if (upper) store_pair(at + 8 * j, quad[0], quad[1], live_upper ? live - before - 8 * j : 0);
        if (lower) store_pair(at + 8 * line + 8 * j, quad[2], quad[3], live_lower ? live - before - 8 * j : 0);
      }
    }
  }

  __device__ __forceinline__ void store_part(const HopperWgradWork& work, const Sums& sums) {
    const bool empty = work.patches == 0;
    float4* to = reinterpret_cast<float4*>(static_cast<unsigned char*>(p_.parts) + work.slot * kHopperPartBytes<Unit>) +
                 (threadIdx.x - 128);
#pragma unroll
    for (int j = 0; j < kHopperQuads<Unit>; ++j) {
      const float* quad = sums[j / 16] + j % 16 * 4;
      to[j * 256] = empty ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : make_float4(quad[0], quad[1], quad[2], quad[3]);
    }
  }

  const ConvHopperWgradParams& p_;
  const HopperWgradShared<Unit>& shared_;
  int group_;
  HopperRing stages_, messages_;
};

template <class T, class Unit>
__device__ __forceinline__ void conv_hopper_wgrad(const ConvHopperWgradParams& p) {
#ifdef TDC_SM90A
  TDC_DYNAMIC_SHARED_1024(memory);
  const HopperWgradShared<Unit> shared(memory, p.stages);
  const int group = shfl(static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) shared.init_barriers(p.stages, hopper_wgrad_readers(p));
  if (threadIdx.x == 32) tensor_map_prefetch(&p.x), tensor_map_prefetch(&p.dy);
  HopperWgradSchedule<Unit>(p, shared.groups).make();  // ends with a barrier, also for the barriers
  if (group == 0) {
    registers_give<56>();
    // One or the other: what outlives the producer costs registers that it has not.
    if (threadIdx.x >= kHopperBiasThread) {
      if (p.bias_sums) HopperWgradBias<Unit>(p, shared).template run<T>();
    } else if (threadIdx.x == 0) {
      HopperWgradProducer<Unit>(p, shared).run();
    }
  } else {
    registers_take<224>();
    HopperWgradConsumer<T, Unit>(p, shared, group - 1).run();
  }
#else
  trap();
#endif
}

// A slice of a unit: so many quads of sums of all threads that multiplied.
template <class T, class Unit>
__device__ __forceinline__ void hopper_wgrad_reduce_slice(const ConvHopperWgradParams& p,
                                                          const HopperWgradSchedule<Unit>& schedule, HopperUnit unit,
                                                          int expert, int slice) {
  constexpr int kQuads = kHopperQuads<Unit> / kHopperReduceSlices;
  unit.run = schedule.run_of(expert);
  int from = 0, to = -1, live_in = 0, live_out = 0;
  if (schedule.locate(unit)) {
    const HopperWgradGroup& group = schedule.group(unit.run);
    from = schedule.part_of(unit, 0), to = schedule.part_of(unit, group.patches - 1);
    if (from == to) return;  // the unit is whole
    live_in = group.expert_in, live_out = group.expert_out;
  }
  const int first = slice * kQuads, thread = threadIdx.x;
  float4 sums[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) sums[q] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
  for (int part = from; part <= to; ++part) {
    const auto* quads = reinterpret_cast<const float4*>(static_cast<const unsigned char*>(p.parts) +
                                                        (2 * part + (part == from ? 1 : 0)) * kHopperPartBytes<Unit>);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 v = quads[(first + q) * 256 + thread];
      sums[q].x += v.x, sums[q].y += v.y, sums[q].z += v.z, sums[q].w += v.w;
    }
  }
  const int lane = thread % 32, co = unit.out + thread / 32 * 16 + lane / 4, end = schedule.end_of_input(unit.in);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int quad = first + q, part_of_unit = quad / 16;
    const int tap = Unit::kOfRows ? unit.row : unit.row * Unit::kParts + part_of_unit;
    const int ci = unit.in + (Unit::kOfRows ? 128 * part_of_unit : 0) + quad % 16 * 8 + lane % 4 * 2;
    if (ci >= end) continue;
    T* at = static_cast<T*>(p.dweight) +
            ((static_cast<long long>(expert) * p.out_channels + co) * p.taps + tap) * p.in_channels + ci;
    if (co < p.out_channels) store_pair(at, sums[q].x, sums[q].y, co < live_out ? live_in - ci : 0);
    at += static_cast<long long>(8 * p.taps) * p.in_channels;
    if (co + 8 < p.out_channels) store_pair(at, sums[q].z, sums[q].w, co + 8 < live_out ? live_in - ci : 0);
  }
}

// Sums the parts of the units that cuts divide, each in the order of the line, and writes zeros into units that have no
// live channels; and the gradients of biases. Blocks take slices of units in turn.
template <class T, class Unit>
__device__ __forceinline__ void conv_hopper_wgrad_reduce(const ConvHopperWgradParams& p) {
#ifdef TDC_SM90A
  TDC_DYNAMIC_SHARED(memory);
  HopperWgradSchedule<Unit> schedule(p, reinterpret_cast<HopperWgradGroup*>(memory));
  schedule.make();
  const int slices = p.routing.num_experts * p.out_tiles * p.in_tiles * p.rows * kHopperReduceSlices;
  for (int i = blockIdx.x; i < slices; i += gridDim.x) {
    const int slice = i % kHopperReduceSlices;
    int rest = i / kHopperReduceSlices;
    HopperUnit unit;
    unit.row = rest % p.rows, rest /= p.rows;
    unit.in = schedule.begin_of_tile(rest % p.in_tiles), rest /= p.in_tiles;
    unit.out = rest % p.out_tiles * kHopperUnit;
    const int expert = rest / p.out_tiles;
    if (unit.row == 0 && unit.in == 0 && slice == 0) {
      HopperBiasSums<T, Unit>(p, schedule, expert, unit.out).add_up();
    }
    hopper_wgrad_reduce_slice<T>(p, schedule, unit, expert, slice);
  }
#else
  trap();
#endif
}

}  // namespace tdc
