// dbias in the Hopper form of wgrad: two warps that would be idle sum the patches of dy that are in shared memory for
// the products, 64 channels each.
//
//   which patches     those of the units with the expert's first input channels. Their filter rows (in the form of rows
//                     their taps) take turns, so that none of them reads all patches twice
//   where sums go     to the workspace: those of a part of a unit to the part's place, those of a whole unit to the
//                     unit's. The second kernel adds them in order
//
// The stages are those that the products wait for, masked where they are, so dy is read once.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/hopper_wgrad_schedule.cuh"
#include "cuda/conv/hopper_wgrad_shared.cuh"

namespace tdc {

template <class Unit>
class HopperWgradBias {
 public:
  __device__ __forceinline__ HopperWgradBias(const ConvHopperWgradParams& p, const HopperWgradShared<Unit>& shared)
      : p_(p), shared_(shared), box_((threadIdx.x - kHopperBiasThread) / 32) {}

  // Whether a unit sums a patch, which has a number among the expert's.
  __device__ __forceinline__ static bool takes(const ConvHopperWgradParams& p, const HopperUnit& unit, int number) {
    return p.bias_sums && unit.in == 0 && (number % p.rows == unit.row || TDC_PLANTED(HOPPER_BIAS_OF_EVERY_ROW));
  }

  // Whole warps.
  template <class T>
  __device__ __forceinline__ void run() {
    HopperWgradControl& c = *shared_.control;
    for (;;) {
      mbarrier_wait(&c.message_full[messages_.stage], messages_.parity);
      const HopperWgradWork& work = c.messages[messages_.stage];
      if (work.expert < 0) return;
      float sums[8] = {};
      for (int left = work.patches; left > 0; --left) add_stage<T>(sums);
      if (work.in == 0) store(work, sums);
      warp_sync();
      hopper_release(&c.message_empty[messages_.stage]);
      messages_.next(kHopperMessages);
    }
  }

  // Of the second kernel: writes the unit's channels of dbias. All threads of the block.
  template <class T>
  __device__ __forceinline__ static void add_up(const ConvHopperWgradParams& p,
                                                const HopperWgradSchedule<Unit>& schedule, int run, int expert,
                                                int out) {
    const int channel = threadIdx.x;
    if (channel >= kHopperUnit || out + channel >= p.out_channels) return;
    float sum = 0.0f;
    for (int row = 0; row < p.rows; ++row) {
      const int begin = schedule.begin_of_unit(run, row, 0, out);
      if (begin < 0 || out + channel >= schedule.group(run).expert_out) break;
      const int from = schedule.part_of(begin), to = schedule.part_of(begin + schedule.group(run).patches - 1);
      if (from == to) sum += p.bias_sums[place_of_unit(p, expert, row, out) + channel];
      for (int part = from; from < to && part <= to; ++part) {
        sum += p.bias_sums[place_of_part(2 * part + (part == from ? 1 : 0)) + channel];
      }
    }
    static_cast<T*>(p.dbias)[static_cast<long long>(expert) * p.out_channels + out + channel] = from_float<T>(sum);
  }

 private:
  __device__ __forceinline__ static long long place_of_part(int slot) {
    return static_cast<long long>(slot) * kHopperUnit;
  }
  __device__ __forceinline__ static long long place_of_unit(const ConvHopperWgradParams& p, int expert, int row,
                                                            int out) {
    const long long tile = static_cast<long long>(expert) * p.out_tiles + out / kHopperUnit;
    return (2 * p.blocks + tile * p.rows + row) * kHopperUnit;
  }

  // A lane has the 8 channels of one chunk, and every fourth pixel.
  template <class T>
  __device__ __forceinline__ void add_stage(float (&sums)[8]) {
    HopperWgradControl& c = *shared_.control;
    const int stage = stages_.stage, lane = threadIdx.x % 32, chunk = lane % 8;
    mbarrier_wait(&c.full[stage], stages_.parity);
    const bool ragged = shared_.is_ragged(stage), taken = c.stages[stage].of_bias;
    if (ragged && !TDC_PLANTED(HOPPER_BIAS_BEFORE_MASK)) hopper_wgrad_readers_sync(p_);
    if (taken) {
      const unsigned char* pixels = shared_.dy(stage) + box_ * kHopperPatch;
#pragma unroll 4
      for (int pixel = lane / 8; pixel < 64; pixel += 4) {
        const uint4 words = load_16(pixels + pixel * kHopperRow + (chunk ^ pixel % 8) * 16);
        add_pair<T>(sums, words.x), add_pair<T>(sums + 2, words.y);
        add_pair<T>(sums + 4, words.z), add_pair<T>(sums + 6, words.w);
      }
    }
    if (ragged && TDC_PLANTED(HOPPER_BIAS_BEFORE_MASK)) hopper_wgrad_readers_sync(p_);
    warp_sync();  // all lanes have read it
    hopper_release(&c.empty[stage]);
    stages_.next(p_.stages);
  }
  template <class T>
  __device__ __forceinline__ static void add_pair(float* sums, unsigned pair) {
    sums[0] += to_float(T{static_cast<unsigned short>(pair & 0xffffu)});
    sums[1] += to_float(T{static_cast<unsigned short>(pair >> 16)});
  }

  __device__ __forceinline__ void store(const HopperWgradWork& work, float (&sums)[8]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      sums[v] += shfl_xor(sums[v], 8);
      sums[v] += shfl_xor(sums[v], 16);
    }
    if (lane >= 8) return;
    const long long place =
        work.slot < 0 ? place_of_unit(p_, work.expert, work.row, work.out) : place_of_part(work.slot);
    float4* to = reinterpret_cast<float4*>(p_.bias_sums + place + box_ * 64 + lane * 8);
    to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }

  const ConvHopperWgradParams& p_;
  const HopperWgradShared<Unit>& shared_;
  int box_;  // of dy, of a warp
  HopperRing stages_, messages_;
};

}  // namespace tdc
