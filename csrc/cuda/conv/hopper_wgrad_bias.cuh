// dbias and dsample_bias in the Hopper form of wgrad: two warps that would be idle sum the patches of dy that are in
// shared memory for the products, 64 channels each.
//
//   which patches     those of the units with the expert's first input channels. Their filter rows (in the form of rows
//                     their taps) take turns, so that none of them reads all patches twice
//   dbias alone       the sums of a part of a unit go to the part's place in the workspace, those of a whole unit to
//                     that of the unit. The second kernel adds them in order
//   dsample_bias      turns are of whole samples. The sums of a sample go to its place; where cuts divide it, what a
//                     block begins within it goes to the block's place. The second kernel adds these to dsample_bias,
//                     and the samples of an expert to dbias
//
// The stages are those that the products wait for, masked where they are, so dy is read once. Sums of dead channels are
// dropped at the end.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/conv/hopper_wgrad_params.h"
#include "cuda/conv/hopper_wgrad_schedule.cuh"
#include "cuda/conv/hopper_wgrad_shared.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

// Where sums lie in the workspace.
__device__ __forceinline__ float* hopper_sums_of_part(const ConvHopperWgradParams& p, int slot) {
  return p.bias_sums + static_cast<long long>(slot) * kHopperUnit;
}
__device__ __forceinline__ float* hopper_sums_of_unit(const ConvHopperWgradParams& p, int expert, int row, int out) {
  const long long tile = static_cast<long long>(expert) * p.out_tiles + out / kHopperUnit;
  return p.bias_sums + (2 * p.blocks + tile * p.rows + row) * kHopperUnit;
}
__device__ __forceinline__ float* hopper_sums_of_sample(const ConvHopperWgradParams& p, int part, int sample, int out) {
  const long long place = static_cast<long long>(part) * p.routing.batch + sample;
  return p.sample_sums + place * p.out_tiles * kHopperUnit + out;
}

// Whether the units of a filter row or tap sum the patch that begins at a row of dy.
__device__ __forceinline__ bool hopper_sums_patch(const ConvHopperWgradParams& p, int first_row, int row) {
  return quotient(first_row, p.by_turn_rows) % p.rows == row || TDC_PLANTED(HOPPER_BIAS_OF_EVERY_ROW);
}

template <class Unit>
class HopperWgradBias {
 public:
  __device__ __forceinline__ HopperWgradBias(const ConvHopperWgradParams& p, const HopperWgradShared<Unit>& shared)
      : p_(p), shared_(shared), box_((threadIdx.x - kHopperBiasThread) / 32) {}

  // Whole warps.
  template <class T>
  __device__ __forceinline__ void run() {
    HopperWgradControl& c = *shared_.control;
    for (;;) {
      mbarrier_wait(&c.message_full[messages_.stage], messages_.parity);
      const HopperWgradWork& work = c.messages[messages_.stage];
      if (work.expert < 0) return;
      float sums[8] = {};
      sample_ = kNone;
      for (int left = work.patches; left > 0; --left) add_stage<T>(work, sums);
      if (sample_ != kNone || (work.in == 0 && !p_.sample_sums)) store(work, sums);
      warp_sync();
      hopper_release(&c.message_empty[messages_.stage]);
      messages_.next(kHopperMessages);
    }
  }

 private:
  static constexpr int kNone = -1, kOfBlock = -2;

  template <class T>
  __device__ __forceinline__ void add_stage(const HopperWgradWork& work, float (&sums)[8]) {
    HopperWgradControl& c = *shared_.control;
    const int stage = stages_.stage;
    mbarrier_wait(&c.full[stage], stages_.parity);
    const bool ragged = shared_.is_ragged(stage);
    if (ragged && !TDC_PLANTED(HOPPER_BIAS_BEFORE_MASK)) hopper_wgrad_readers_sync(p_);
    if (work.in == 0 && hopper_sums_patch(p_, c.stages[stage].first_row, work.row)) add_patch<T>(work, sums);
    if (ragged && TDC_PLANTED(HOPPER_BIAS_BEFORE_MASK)) hopper_wgrad_readers_sync(p_);
    warp_sync();  // all lanes have read it
    hopper_release(&c.empty[stage]);
    stages_.next(p_.stages);
  }

  // Where samples are summed, each that ends in the patch is stored.
  template <class T>
  __device__ __forceinline__ void add_patch(const HopperWgradWork& work, float (&sums)[8]) {
    const HopperWgradStage& what = shared_.control->stages[stages_.stage];
    const int end = min(kHopperPatchRows, what.pixels);
    if (!p_.sample_sums) {
      add_rows<T>(sums, 0, kHopperPatchRows);
      return;
    }
    int sample = quotient(what.first_row, p_.by_sample_rows);
    int row = 0, next = (sample + 1) * p_.sample_rows - what.first_row;  // where the next sample begins
    for (; row < end; row = next, next += p_.sample_rows, ++sample) {
      if (sample_ == kNone) {
        const bool begins = row || next == p_.sample_rows || TDC_PLANTED(HOPPER_SAMPLE_CUT_IN_PLACE);
        sample_ = begins ? sample : kOfBlock;
      }
      add_rows<T>(sums, row, min(end, next));
      if (next > end) return;
      store(work, sums);
      sample_ = kNone;
      if (TDC_PLANTED(HOPPER_SAMPLE_GOES_ON)) continue;
#pragma unroll
      for (int v = 0; v < 8; ++v) sums[v] = 0.0f;
    }
  }

  // Rows of the patch. A lane has the 8 channels of one chunk, and every fourth row.
  template <class T>
  __device__ __forceinline__ void add_rows(float (&sums)[8], int first, int end) {
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    const unsigned char* rows = shared_.dy(stages_.stage) + box_ * kHopperPatch;
#pragma unroll 4
    for (int row = first + lane / 8; row < end; row += 4) {
      const uint4 words = load_16(rows + row * kHopperRow + (chunk ^ row % 8) * 16);
      add_pair<T>(sums, words.x), add_pair<T>(sums + 2, words.y);
      add_pair<T>(sums + 4, words.z), add_pair<T>(sums + 6, words.w);
    }
  }
  template <class T>
  __device__ __forceinline__ static void add_pair(float* sums, unsigned pair) {
    sums[0] += to_float(T{static_cast<unsigned short>(pair & 0xffffu)});
    sums[1] += to_float(T{static_cast<unsigned short>(pair >> 16)});
  }

  __device__ __forceinline__ void store(const HopperWgradWork& work, float (&sums)[8]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      sums[v] += shfl_xor(sums[v], 8);
      sums[v] += shfl_xor(sums[v], 16);
    }
    if (lane >= 8) return;
    float4* to = reinterpret_cast<float4*>(place_of(work) + box_ * 64 + lane * 8);
    to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
  __device__ __forceinline__ float* place_of(const HopperWgradWork& work) const {
    if (!p_.sample_sums) {
      return work.slot < 0 ? hopper_sums_of_unit(p_, work.expert, work.row, work.out)
                           : hopper_sums_of_part(p_, work.slot);
    }
    return sample_ == kOfBlock ? hopper_sums_of_part(p_, blockIdx.x) : hopper_sums_of_sample(p_, 0, sample_, work.out);
  }

  const ConvHopperWgradParams& p_;
  const HopperWgradShared<Unit>& shared_;
  int box_;             // of dy, of a warp
  int sample_ = kNone;  // whose sums these are; kOfBlock: that which the block begins within
  HopperRing stages_, messages_;
};

// Of the second kernel: the biases' gradients of an expert's kHopperUnit channels. All threads of a block call it.
template <class T, class Unit>
class HopperBiasSums {
  static constexpr int kQuads = kHopperUnit / 4, kRows = kHopperReduceThreads / kQuads;

 public:
  __device__ __forceinline__ HopperBiasSums(const ConvHopperWgradParams& p, const HopperWgradSchedule<Unit>& schedule,
                                            int expert, int out)
      : p_(p), schedule_(schedule), run_(schedule.run_of(expert)), expert_(expert), out_(out) {}

  __device__ __forceinline__ void add_up() const {
    if (p_.sample_sums) {
      add_up_samples();
    } else if (p_.bias_sums) {
      add_up_parts();
    }
  }

 private:
  __device__ __forceinline__ void add_up_parts() const {
    const int channel = threadIdx.x;
    if (channel >= kHopperUnit || out_ + channel >= p_.out_channels) return;
    float sum = 0.0f;
    for (int row = 0; row < p_.rows; ++row) {
      HopperUnit unit{run_, row, 0, out_};
      if (!schedule_.locate(unit) || out_ + channel >= schedule_.group(run_).expert_out) break;
      const int from = schedule_.part_of(unit, 0), to = schedule_.part_of(unit, schedule_.group(run_).patches - 1);
      if (from == to) sum += hopper_sums_of_unit(p_, expert_, row, out_)[channel];
      for (int part = from; from < to && part <= to; ++part) {
        sum += hopper_sums_of_part(p_, 2 * part + (part == from ? 1 : 0))[channel];
      }
    }
    static_cast<T*>(p_.dbias)[static_cast<long long>(expert_) * p_.out_channels + out_ + channel] = from_float<T>(sum);
  }

  // A thread has four channels, and every kRows-th sample of a group. Channels are multiples of 8.
  __device__ __forceinline__ void add_up_samples() const {
    TDC_SHARED(float4, rows, kHopperReduceThreads);
    const int quad = threadIdx.x % kQuads, row = threadIdx.x / kQuads, channel = out_ + 4 * quad;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int i = run_; run_ >= 0 && i < p_.routing.num_groups && schedule_.group(i).run == run_; ++i) {
      const HopperWgradGroup& group = schedule_.group(i);
      for (int s = row; s < group.samples; s += kRows) {
        const float4 sum = cut_off(sum_of(group, s, channel), group.live_out - channel);
        total = added(total, sum);
        const long long place = static_cast<long long>(group.first + s) * p_.out_channels + channel;
        if (p_.dsample_bias && channel < p_.out_channels) store_quad(static_cast<T*>(p_.dsample_bias) + place, sum);
      }
    }
    block_sync();  // all have read what an earlier call left
    rows[threadIdx.x] = total;
    block_sync();
    if (row != 0 || channel >= p_.out_channels || !p_.dbias) return;
    for (int other = 1; other < kRows; ++other) total = added(total, rows[other * kQuads + quad]);
    store_quad(static_cast<T*>(p_.dbias) + static_cast<long long>(expert_) * p_.out_channels + channel, total);
  }

  // A sample's sum of four channels: from its place, and from those of the blocks that begin within it.
  __device__ __forceinline__ float4 sum_of(const HopperWgradGroup& group, int s, int channel) const {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (channel >= group.live_out) return sum;
    for (int part = 0; part < p_.sample_parts; ++part) {
      sum = added(sum, at(hopper_sums_of_sample(p_, part, group.first + s, channel)));
    }
    if (!p_.bias_sums) return sum;
    const int first_row = s * p_.sample_rows, first = first_row / 64, last = (first_row + p_.sample_rows - 1) / 64;
    const int turn = quotient(group.first * p_.sample_rows + 64 * first, p_.by_turn_rows) % p_.rows;
    HopperUnit unit{run_, turn, 0, out_};
    schedule_.locate(unit);
    const int end = schedule_.part_of(unit, group.before + last);
    for (int part = schedule_.part_of(unit, group.before + first) + 1; part <= end; ++part) {
      sum = added(sum, at(hopper_sums_of_part(p_, part) + channel - out_));
    }
    return sum;
  }

  __device__ __forceinline__ static float4 at(const float* place) { return *reinterpret_cast<const float4*>(place); }
  __device__ __forceinline__ static float4 added(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
  // Zeros where channels are not live: what was summed there may be anything.
  __device__ __forceinline__ static float4 cut_off(const float4& v, int live) {
    return make_float4(live > 0 ? v.x : 0.0f, live > 1 ? v.y : 0.0f, live > 2 ? v.z : 0.0f, live > 3 ? v.w : 0.0f);
  }
  __device__ __forceinline__ static void store_quad(T* to, const float4& v) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w));
  }

  const ConvHopperWgradParams& p_;
  const HopperWgradSchedule<Unit>& schedule_;
  int run_, expert_, out_;
};

}  // namespace tdc
