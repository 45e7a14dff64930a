#pragma once

// Kernels that test Hopper's units (cuda/device_sm90.cuh) in the emulator and, by the same tests, on a GPU: boxes,
// encodings of operands, a pipeline with every kind of wait, and a cluster; in the last two a bug is planted by number.
#include "cuda/device_sm90.cuh"

namespace tdc {

struct alignas(64) HopperTestParams {
  TensorMap a, b;  // b: of the operand, or where a box is stored
  void* out;
  int at[5];                                                                       // of a box of a
  int boxes_b;                                                                     // of 64 channels
  int distance_b;                                                                  // bytes from one to the next
  int start_a, start_b, leading_a, leading_b, stride_a, stride_b, step_a, step_b;  // bytes
  int count;
  int mode;
  int dimensions;  // of a, and of b in mode 1 of the box: a kernel cannot read them from a map
};

__device__ inline void init_barriers(Mbarrier* barriers, int number, int count) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < number; ++i) mbarrier_init(barriers + i, count);
    mbarrier_init_fence();
  }
  block_sync();
}

// Loads a box and writes its bytes to `out` as they lie in shared memory, `count` chunks of 16 bytes. With mode 1 it
// stores the box through map b instead, with mode 2 row after row of 128 bytes, through a map of boxes of a row.
TDC_KERNEL(self_test_box, HopperTestParams, 32) {
  TDC_DYNAMIC_SHARED_1024(shared);
  TDC_SHARED(Mbarrier, barrier, 1);
  init_barriers(barrier, 1, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 16 * p.count);
    const int at3[3] = {p.at[0], p.at[1], p.at[2]}, at4[4] = {p.at[0], p.at[1], p.at[2], p.at[3]};
    if (p.dimensions == 3) tma_load(shared, &p.a, barrier, at3);
    if (p.dimensions == 4) tma_load(shared, &p.a, barrier, at4);
    if (p.dimensions == 5) tma_load(shared, &p.a, barrier, p.at);
  }
  mbarrier_wait(barrier, 0);
  if (p.mode == 0) {
    for (int i = threadIdx.x; i < p.count; i += 32) store_16(static_cast<uint4*>(p.out) + i, load_16(shared + 16 * i));
  } else if (threadIdx.x == 0 && p.mode == 2) {
    for (int row = 0; row < p.count / 8; ++row) {
      const int at3[3] = {p.at[0], p.at[1] + row, p.at[2]};
      tma_store(&p.b, shared + 128 * row, at3);
    }
    bulk_commit();
    bulk_wait_read<0>();
  } else if (threadIdx.x == 0) {
    const int at3[3] = {p.at[0], p.at[1], p.at[2]}, at4[4] = {p.at[0], p.at[1], p.at[2], p.at[3]};
    if (p.dimensions == 3) tma_store(&p.b, shared, at3);
    if (p.dimensions == 4) tma_store(&p.b, shared, at4);
    if (p.dimensions == 5) tma_store(&p.b, shared, p.at);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// out (64, columns) = a (64 x 64) b (64 x columns) of one box of a at place `at` and `boxes_b` of b, next to each other
// in channels, through descriptors that start, step and stride as the parameters say.
template <class T, int kColumns, int kOuterA, int kOuterB>
__device__ __forceinline__ void multiply_boxes(const HopperTestParams& p, const unsigned char* a,
                                               const unsigned char* b) {
  float sums[kColumns / 2];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<T, kColumns, kOuterA, kOuterB>(
        sums,
        descriptor(descriptor_low(shared_window(a) + p.start_a + k * p.step_a, p.leading_a),
                   descriptor_high(p.stride_a)),
        descriptor(descriptor_low(shared_window(b) + p.start_b + k * p.step_b, p.leading_b),
                   descriptor_high(p.stride_b)),
        k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_settle(sums);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = 16 * warp + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    static_cast<float*>(p.out)[row * kColumns + column] = sums[i];
  }
}

TDC_KERNEL(self_test_wgmma, HopperTestParams, 128) {
  TDC_DYNAMIC_SHARED_1024(shared);
  TDC_SHARED(Mbarrier, barrier, 1);
  init_barriers(barrier, 1, 1);
  unsigned char* b = shared + 48 * 1024;
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, p.count);
    const int at[4] = {0, 0, 0, 0};
    tma_load(shared, &p.a, barrier, at);
    for (int i = 0; i < p.boxes_b; ++i) {
      const int at_b[4] = {64 * i, 0, 0, 0}, rows[4] = {0, 64 * i, 0, 0};
      // With k inside, further columns are further rows.
      tma_load(b + i * p.distance_b, &p.b, barrier, p.mode == 0 || (p.mode > 2 && p.mode < 7) ? rows : at_b);
    }
  }
  mbarrier_wait(barrier, 0);
  switch (p.mode) {
    case 0:
      return multiply_boxes<bf16, 128, 0, 0>(p, shared, b);
    case 1:
      return multiply_boxes<bf16, 128, 0, 1>(p, shared, b);
    case 2:
      return multiply_boxes<bf16, 128, 1, 1>(p, shared, b);
    case 3:
      return multiply_boxes<half, 64, 0, 0>(p, shared, b);
    case 4:
      return multiply_boxes<half, 96, 0, 0>(p, shared, b);
    case 5:
      return multiply_boxes<half, 192, 0, 0>(p, shared, b);
    case 6:
      return multiply_boxes<half, 144, 0, 0>(p, shared, b);
    case 7:
      return multiply_boxes<bf16, 64, 0, 1>(p, shared, b);
    case 8:
      return multiply_boxes<half, 96, 0, 1>(p, shared, b);
    case 9:
      return multiply_boxes<bf16, 144, 0, 1>(p, shared, b);
    case 10:
      return multiply_boxes<half, 192, 0, 1>(p, shared, b);
    case 11:
      return multiply_boxes<half, 64, 1, 1>(p, shared, b);
    case 12:
      return multiply_boxes<bf16, 96, 1, 1>(p, shared, b);
    case 13:
      return multiply_boxes<half, 32, 0, 0>(p, shared, b);
    case 14:
      return multiply_boxes<bf16, 48, 0, 0>(p, shared, b);
    case 15:
      return multiply_boxes<bf16, 32, 0, 1>(p, shared, b);
    default:
      return multiply_boxes<half, 48, 0, 1>(p, shared, b);
  }
}

// The bugs of the pipeline below; tests/emulator/test_sm90_faults.py has their numbers and messages.
enum PipelineBug {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kWrongPhase,
  kExpectsLess,
  kExpectsMore,
  kEarlyRelease,
  kNoProductWait,
  kNoProductFence,
  kNoAsyncFence,
  kNoStoreWait,
  kNoInitFence,
  kNoInitBarrier,
  kWrongDescriptor,
  kUnalignedBase,
  kTooManyArrivals,
  kTakesTooMany,
  kOverwritesStaging,
};

// y (2, 64, 64) in bf16 = a (64, 64 count) times b (64, 64 count) transposed, once and doubled, in steps of 64 of the
// depth through a ring of two stages. Warpgroup 0 loads, warpgroup 1 multiplies, warpgroup 2 is there for the
// registers.
struct alignas(64) PipelineParams {
  TensorMap a, b, y;
  int count;
  int bug;
};

TDC_KERNEL(self_test_pipeline, PipelineParams, 384, 1) {
  constexpr int kStages = 2, kOperand = 64 * 128, kStage = 2 * kOperand;
  TDC_DYNAMIC_SHARED_1024(shared);
  TDC_SHARED(Mbarrier, full, kStages);
  TDC_SHARED(Mbarrier, empty, kStages);
  const auto bug = [&](int which) { return p.bug == which; };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 4);
    if (!bug(kNoInitFence)) mbarrier_init_fence();
  }
  if (!bug(kNoInitBarrier)) block_sync();
  if (threadIdx.x >= 256) return;
  if (threadIdx.x < 128) {
    if (bug(kTakesTooMany)) {
      registers_give<112>();
    } else {
      registers_give<104>();
    }
    if (threadIdx.x != 0) return;
    for (int i = 0; i < p.count; ++i) {
      const int stage = i % kStages;
      unsigned char* to = shared + stage * kStage;
      if (!bug(kNoEmptyWait)) mbarrier_wait(empty + stage, (i / kStages & 1) ^ (bug(kWrongPhase) ? 0 : 1));
      mbarrier_arrive_expect(full + stage, kStage + (bug(kExpectsMore) ? 128 : bug(kExpectsLess) ? -kOperand : 0));
      const int at[3] = {64 * i, 0, 0};
      tma_load(to, &p.a, full + stage, at);
      tma_load(to + kOperand, &p.b, full + stage, at);
    }
    return;
  }
  registers_take<232>();
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float sums[32];
  for (int i = 0; i < p.count; ++i) {
    const int stage = i % kStages;
    const unsigned from = shared_window(shared + stage * kStage);
    if (!bug(kNoFullWait)) mbarrier_wait(full + stage, i / kStages & 1);
    if (!bug(kNoProductFence)) wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      const unsigned high = descriptor_high(1024) | (bug(kUnalignedBase) ? 1u << 17 : 0u);
      wgmma<bf16, 64, 0, 0>(sums, descriptor(descriptor_low(from + (bug(kWrongDescriptor) ? 0 : 32 * k), 16), high),
                            descriptor(descriptor_low(from + kOperand + 32 * k, 16), descriptor_high(1024)),
                            i > 0 || k > 0);
    }
    wgmma_commit();
    if (bug(kEarlyRelease) && lane == 0) mbarrier_arrive(empty + stage);
    if (!bug(kNoProductWait)) wgmma_wait<0>();
    if (!bug(kEarlyRelease) && lane == 0) mbarrier_arrive(empty + stage);
    if (bug(kTooManyArrivals) && lane == 1) mbarrier_arrive(empty + stage);
  }
  if (bug(kNoProductWait)) {
    for (int i = 0; i < 4; ++i) sums[i] += 1;
    wgmma_wait<0>();
  }
  wgmma_settle(sums);
  // Each warp its 16 rows, in two rounds through one buffer.
  unsigned char* staging = shared + kStages * kStage + warp * 2048;
  for (int round = 0; round < 2; ++round) {
    if (lane == 0 && !bug(kOverwritesStaging)) bulk_wait_read<0>();
    warp_sync();
    for (int j = 0; j < 4; ++j) {
      unsigned r[4];
      for (int h = 0; h < 2; ++h) {
        const float* s = sums + 8 * j + 4 * h;
        r[2 * h] = pack<bf16>(s[0] * (1 + round), s[1] * (1 + round));
        r[2 * h + 1] = pack<bf16>(s[2] * (1 + round), s[3] * (1 + round));
      }
      const int row = lane % 16, chunk = 2 * j + lane / 16;
      stmatrix_x4(staging + row * 128 + (chunk ^ row % 8) * 16, r);
    }
    if (!bug(kNoAsyncFence)) async_fence();
    warp_sync();
    if (lane == 0) {
      const int at[3] = {0, 16 * warp, round};
      tma_store(&p.y, staging, at);
      bulk_commit();
    }
  }
  if (lane == 0 && !bug(kNoStoreWait)) bulk_wait_read<0>();
}

// The bugs of the cluster below; tests/emulator/test_cluster.py has their messages.
enum ClusterBug {
  kNoClusterBug,
  kNoFirstBarrier,
  kNoFirstWait,
  kNoSecondBarrier,
  kNoLastBarrier,
  kNoLastWait,
  kArrivesTwice,
  kWaitsAlone,
  kHalfAWarp,
  kOneOwner,
  kWrongRank,
  kSomeLeave,  // no bug: what has exited is not waited for
};

struct ClusterTestParams {
  const int* in;  // (blocks, 64)
  int* out;       // (blocks, 2, 64)
  int bug;
};

// Of each cluster of four blocks: out[block][0][i] is what all of them have at 63 - i, added up in the order of ranks,
// and out[block][1][i] what the block before has at i.
TDC_KERNEL(self_test_cluster, ClusterTestParams, 64, 1, 4) {
  TDC_DYNAMIC_SHARED(memory);
  TDC_SHARED(int, received, 64);
  const auto bug = [&](int which) { return p.bug == which; };
  const int rank = cluster_rank(), blocks = cluster_blocks(), thread = static_cast<int>(threadIdx.x);
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  int* own = reinterpret_cast<int*>(memory);
  own[thread] = p.in[block * 64 + thread];
  if (bug(kSomeLeave) && rank == 2 && thread >= 32) return;
  if (bug(kHalfAWarp) && thread % 32 < 16) return;
  if (!bug(kNoFirstBarrier) && !bug(kWaitsAlone)) cluster_arrive();
  if (bug(kArrivesTwice)) cluster_arrive();
  if (!bug(kNoFirstBarrier) && !bug(kNoFirstWait)) cluster_wait();
  int sum = 0;
  for (int r = 0; r < blocks + (bug(kWrongRank) ? 1 : 0); ++r) {
    if (bug(kSomeLeave) && r == 2 && thread < 32) continue;
    sum += cluster_shared(own, r)[63 - thread];
  }
  cluster_shared(received, bug(kOneOwner) ? 0 : (rank + 1) % blocks)[thread] = own[thread];
  p.out[block * 128 + thread] = sum;
  if (!bug(kNoSecondBarrier)) cluster_arrive();
  if (bug(kNoFirstWait)) cluster_wait();
  if (!bug(kNoSecondBarrier)) cluster_wait();
  p.out[block * 128 + 64 + thread] = received[thread];
  if (!bug(kNoLastBarrier) && !bug(kNoLastWait)) return;
  // Of the next block, which waits for nothing after this.
  p.out[block * 128 + thread] += cluster_shared(own, (rank + 1) % blocks)[thread];
  if (bug(kNoLastBarrier)) return;
  cluster_arrive();
  if (rank != 1) cluster_wait();
}

// In each cluster of four blocks every block sends kRounds times its numbers to the next one, which waits for them at
// an mbarrier of its own, and tells the sender's that it has read them: out[block][0][i] is made of the sender's 63 -
// i.
TDC_KERNEL(self_test_cluster_ring, ClusterTestParams, 64, 1, 4) {
  constexpr int kRounds = 4;
  TDC_SHARED(Mbarrier, full, 1);
  TDC_SHARED(Mbarrier, empty, 1);
  TDC_SHARED(uint4, received, 64);
  const int rank = cluster_rank(), blocks = cluster_blocks(), thread = static_cast<int>(threadIdx.x);
  const int next = (rank + 1) % blocks, before = (rank + blocks - 1) % blocks;
  const int block = blockIdx.y * gridDim.x + blockIdx.x, own = p.in[block * 64 + thread];
  if (thread == 0) {
    mbarrier_init(full, 2), mbarrier_init(empty, 2);  // warps
    mbarrier_init_fence();
  }
  warp_sync();
  cluster_arrive(), cluster_wait();
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (p.bug != 1) mbarrier_wait_cluster(empty, (round & 1) ^ 1);
    const unsigned sent = static_cast<unsigned>(own + round);
    store_16(cluster_shared(received + thread, next), make_uint4(sent, 0, 0, sent + 1));
    warp_sync();
    if (thread % 32 == 0) mbarrier_arrive_at(full, next);
    if (p.bug != 2) mbarrier_wait_cluster(full, round & 1);
    const uint4 words = load_16(received + 63 - thread);
    sum = 3 * sum + static_cast<int>(words.x) + static_cast<int>(words.w);
    warp_sync();
    if (thread % 32 == 0) mbarrier_arrive_at(empty, before);
  }
  p.out[block * 128 + thread] = sum;
  cluster_arrive(), cluster_wait();
}

// The encodings of cuda/device_sm90.cuh, bit by bit.
static_assert(descriptor(descriptor_low(0x400, 16), descriptor_high(1024)) == 0x4000004000010040ull, "rows in order");
static_assert(descriptor(descriptor_low(0x400 + 19 * 128, 16), descriptor_high(18 * 128)) == 0x40000090000100D8ull,
              "a patch in a box 18 wide, from its pixel 19");
static_assert(descriptor(descriptor_low(0x10400 + 2048, 8192), descriptor_high(1024)) == 0x40000040020010C0ull,
              "k outside, two boxes of 8192 bytes, 16 further along k");
static_assert(descriptor(descriptor_low(0x4400 + 128, 10240), descriptor_high(10 * 128)) == 0x4000005002800448ull,
              "k outside, a patch in boxes 10 wide, from pixel 1");

}  // namespace tdc
