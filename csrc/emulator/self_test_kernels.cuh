#pragma once

// Kernels that test the emulator itself: each primitive against its definition, and faults that must be reported.
// They are ordinary kernels: nvcc and NVRTC compile them too.
#include "cuda/device.cuh"

namespace tdc {

struct SelfTestParams {
  const void* in;
  const void* other;
  void* out;
  int count;
  int mode;
};

__device__ inline int self_test_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// out[thread] = its x, block and the sizes, of a grid in three dimensions.
TDC_KERNEL(self_test_indices, SelfTestParams, 64) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  store_16(static_cast<uint4*>(p.out) + block * blockDim.x + threadIdx.x,
           make_uint4(threadIdx.x, block, blockDim.x, gridDim.x * gridDim.y * gridDim.z));
}

// Six results per thread of what each does to in[thread].
TDC_KERNEL(self_test_shuffles, SelfTestParams, 64) {
  const int thread = self_test_thread();
  const int value = static_cast<const int*>(p.in)[thread];
  int* out = static_cast<int*>(p.out) + 6 * thread;
  out[0] = shfl(value, p.mode);
  out[1] = shfl_xor(value, p.mode);
  out[2] = shfl_down(value, p.mode);
  out[3] = shfl_up(value, p.mode);
  out[4] = static_cast<int>(ballot(value % 3 == 0));
  out[5] = static_cast<int>(__float_as_uint(shfl_xor(__uint_as_float(static_cast<unsigned>(value)), 1)));
}

// 32 rows of 16 bytes through shared memory into registers: mode 0 and 1 x4, 2 and 3 x2, odd ones transposed.
TDC_KERNEL(self_test_ldmatrix, SelfTestParams, 32) {
  TDC_SHARED(uint4, rows, 32);
  const int lane = static_cast<int>(threadIdx.x);
  rows[lane] = load_16(static_cast<const uint4*>(p.in) + lane);
  warp_sync();
  unsigned four[4], two[2];
  if (p.mode == 0) ldmatrix_x4(four, &rows[lane]);
  if (p.mode == 1) ldmatrix_x4_trans(four, &rows[lane]);
  if (p.mode == 2) ldmatrix_x2(two, &rows[lane]);
  if (p.mode == 3) ldmatrix_x2_trans(two, &rows[lane]);
  unsigned* out = static_cast<unsigned*>(p.out) + 4 * lane;
  for (int i = 0; i < (p.mode < 2 ? 4 : 2); ++i) out[i] = p.mode < 2 ? four[i] : two[i];
}

// d += a b on registers as given: in (32, 4), other (32, 2), out (32, 4). mode 0 bf16, 1 half, 2 tf32.
TDC_KERNEL(self_test_mma, SelfTestParams, 32) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned a[4], b[2];
  float d[4];
  float* out = static_cast<float*>(p.out) + 4 * lane;
  for (int i = 0; i < 4; ++i) a[i] = static_cast<const unsigned*>(p.in)[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = static_cast<const unsigned*>(p.other)[2 * lane + i];
  for (int i = 0; i < 4; ++i) d[i] = out[i];
  if (p.mode == 0) mma_16x8x16(d, a, b, bf16());
  if (p.mode == 1) mma_16x8x16(d, a, b, half());
  if (p.mode == 2) mma_16x8x8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}

// float -> bits (mode 0 bf16, 1 half, 2 tf32) and bits -> float (3 bf16, 4 half); pack (5 bf16, 6 half).
TDC_KERNEL(self_test_convert, SelfTestParams, 64) {
  const int i = self_test_thread();
  if (i >= p.count) return;
  const float value = static_cast<const float*>(p.in)[i];
  const auto bits = static_cast<unsigned short>(static_cast<const unsigned*>(p.in)[i]);
  unsigned result = 0;
  if (p.mode == 0) result = from_float<bf16>(value).bits;
  if (p.mode == 1) result = from_float<half>(value).bits;
  if (p.mode == 2) result = to_tf32(value);
  if (p.mode == 3) result = __float_as_uint(to_float(bf16{bits}));
  if (p.mode == 4) result = __float_as_uint(to_float(half{bits}));
  if (p.mode == 5) result = pack<bf16>(value, -value);
  if (p.mode == 6) result = pack<half>(value, -value);
  static_cast<unsigned*>(p.out)[i] = result;
}

// Reverses each block's values through shared memory.
TDC_KERNEL(self_test_reverse, SelfTestParams, 128) {
  TDC_SHARED(float, values, 128);
  values[threadIdx.x] = static_cast<const float*>(p.in)[self_test_thread()];
  if (!TDC_PLANTED(SELF_NO_BARRIER)) block_sync();
  static_cast<float*>(p.out)[self_test_thread()] = values[blockDim.x - 1 - threadIdx.x];
}

// The same within a warp.
TDC_KERNEL(self_test_warp_reverse, SelfTestParams, 32) {
  TDC_SHARED(float, values, 32);
  values[threadIdx.x] = static_cast<const float*>(p.in)[threadIdx.x];
  if (!TDC_PLANTED(SELF_NO_WARP_SYNC)) warp_sync();
  static_cast<float*>(p.out)[threadIdx.x] = values[31 - threadIdx.x];
}

// Sums `count` rows of 128 floats, each row multiplied by the one before it in the ring (so that threads read what
// others copied), through a ring of three stages filled by cp_async. A block of 32 threads.
TDC_KERNEL(self_test_stages, SelfTestParams, 32) {
  TDC_DYNAMIC_SHARED(memory);
  constexpr int kStages = 3, kRow = 128;
  float* ring = reinterpret_cast<float*>(memory);  // [stages, 128]
  const float* in = static_cast<const float*>(p.in);
  const int lane = static_cast<int>(threadIdx.x);
  auto issue = [&](int row) {
    if (row < p.count) cp_async_16(ring + row % kStages * kRow + 4 * lane, in + row * kRow + 4 * lane, true);
    if (!TDC_PLANTED(SELF_NO_COMMIT)) cp_async_commit();
  };
  float sum = 0;
  issue(0);
  issue(1);
  for (int row = 0; row < p.count; ++row) {
    if (!TDC_PLANTED(SELF_NO_WAIT)) cp_async_wait<1>();
    if (!TDC_PLANTED(SELF_NO_STAGE_BARRIER)) block_sync();
    issue(row + 2);
    const int stage = (row + (TDC_PLANTED(SELF_WRONG_STAGE) ? 1 : 0)) % kStages;
    for (int i = 0; i < 4; ++i) sum += ring[stage * kRow + 4 * (31 - lane) + i];
  }
  static_cast<float*>(p.out)[lane] = sum;
}

// out[i] = in[i] where other[i] is set, else 0, by 4-byte copies of what was asked for before.
TDC_KERNEL(self_test_copy_4, SelfTestParams, 32) {
  TDC_SHARED(int, values, 32);
  const int lane = static_cast<int>(threadIdx.x);
  prefetch(static_cast<const int*>(p.in) + lane);
  cp_async_4(&values[lane], static_cast<const int*>(p.in) + lane, static_cast<const int*>(p.other)[lane] != 0);
  cp_async_commit();
  cp_async_wait<0>();
  static_cast<int*>(p.out)[lane] = values[lane];
}

// Warp 0 makes `count` rows of 32 for warp 1 through one buffer: barrier 1 says full, barrier 2 says empty.
TDC_KERNEL(self_test_producer, SelfTestParams, 64) {
  TDC_SHARED(float, buffer, 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x < 32) {
    for (int row = 0; row < p.count; ++row) {
      if (row > 0 && !TDC_PLANTED(SELF_NO_EMPTY_WAIT)) named_barrier_sync(2, 64);
      buffer[lane] = static_cast<const float*>(p.in)[32 * row + lane];
      named_barrier_arrive(1, 64);
    }
  } else {
    for (int row = 0; row < p.count; ++row) {
      named_barrier_sync(1, 64);
      static_cast<float*>(p.out)[32 * row + lane] = 2 * buffer[31 - lane];
      if (row + 1 < p.count && !TDC_PLANTED(SELF_NO_EMPTY_WAIT)) named_barrier_arrive(2, 64);
    }
  }
}

// out[0] += every in[thread], out[1] counts threads, out[2] = the largest; as a float too, in other[0].
TDC_KERNEL(self_test_atomics, SelfTestParams, 128) {
  TDC_SHARED(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  block_sync();
  const int value = static_cast<const int*>(p.in)[self_test_thread()];
  int* out = static_cast<int*>(p.out);
  atomic_add_int(&out[0], value);
  atomic_add_int(&count[0], 1);
  atomic_max_int(&out[2], value);
  atomic_add_float(static_cast<float*>(const_cast<void*>(p.other)), static_cast<float>(value));
  block_sync();
  if (threadIdx.x == 0) atomic_add_int(&out[1], count[0]);
}

// Accesses that do not conflict (mode 0), an atomic and a plain read that do (1), two writers of one byte (2).
TDC_KERNEL(self_test_conflicts, SelfTestParams, 64) {
  TDC_SHARED(int, count, 1);
  TDC_SHARED(unsigned char, bytes, 64);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) count[0] = 0;
  block_sync();
  atomic_add_int(&count[0], 1);
  if (p.mode == 1 && thread == 5) static_cast<int*>(p.out)[0] = count[0];
  bytes[p.mode == 2 ? thread / 2 : thread] = 1;
  block_sync();
  static_cast<int*>(p.out)[thread] = count[0] + bytes[63 - thread];
}

// Through global memory: all read what is given and write their own (mode 0) and add their neighbour's, with barriers
// (1) or without (2); every block writes one place (3); a block reads what the one before it wrote (4).
TDC_KERNEL(self_test_global, SelfTestParams, 32) {
  const int thread = self_test_thread(), neighbour = thread ^ 1;
  int* out = static_cast<int*>(p.out);
  out[thread] = static_cast<const int*>(p.in)[0];
  if (p.mode == 1) block_sync();
  const int theirs = p.mode == 1 || p.mode == 2 ? out[neighbour] : 0;
  if (p.mode == 1) block_sync();
  out[thread] += theirs;
  if (p.mode == 3 && threadIdx.x == 0) out[gridDim.x * blockDim.x] = 1;
  if (p.mode == 4 && blockIdx.x == 1) out[thread] += out[0];
}

// The last block to arrive adds up what all blocks wrote: out[0] = the sum of in[block], and the counter in[gridDim.x]
// is 0 again.
TDC_KERNEL(self_test_last_block, SelfTestParams, 64) {
  TDC_SHARED(int, last, 1);
  const int* in = static_cast<const int*>(p.in);
  int *out = static_cast<int*>(p.out), *counter = static_cast<int*>(const_cast<void*>(p.other));
  const int blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 40) out[1 + blockIdx.x] = in[blockIdx.x];
  if (!TDC_PLANTED(SELF_NO_BARRIER_BEFORE_ARRIVAL)) block_sync();
  if (threadIdx.x == 0) {
    if (!TDC_PLANTED(SELF_NO_RELEASE)) device_fence();
    last[0] = atomic_add_int(counter, 1) == blocks - 1;
    if (!TDC_PLANTED(SELF_NO_ACQUIRE)) device_fence();
    if (last[0]) atomic_add_int(counter, -blocks);
  }
  block_sync();
  if (!last[0] || threadIdx.x != 20) return;
  int sum = 0;
  for (int block = 0; block < blocks; ++block) sum += out[1 + block];
  out[0] = sum;
}

// Reads of unwritten memory: mode 0 dynamic shared memory, 1 a static array, 2 a local array.
TDC_KERNEL(self_test_unwritten, SelfTestParams, 32) {
  TDC_DYNAMIC_SHARED(memory);
  TDC_SHARED(float, values, 32);
  float locals[32];
  if (p.count < 0) {
    for (int i = 0; i < 32; ++i) locals[i] = 0;
  }
  const float* from = p.mode == 0 ? reinterpret_cast<const float*>(memory) : p.mode == 1 ? values : locals;
  static_cast<float*>(p.out)[threadIdx.x] = from[threadIdx.x];
}

// Writes one byte at shared[count] (mode 0) or at out[count] (mode 1), or reads one at in[count] (mode 2).
TDC_KERNEL(self_test_bounds, SelfTestParams, 32) {
  TDC_DYNAMIC_SHARED(memory);
  if (threadIdx.x != 0) return;
  if (p.mode == 0) memory[p.count] = 1;
  if (p.mode == 1) static_cast<unsigned char*>(p.out)[p.count] = 1;
  if (p.mode == 2) memory[0] = static_cast<const unsigned char*>(p.in)[p.count];
}

// One fault for each mode; see tests/emulator/test_faults.py, which has their names.
TDC_KERNEL(self_test_faults, SelfTestParams, 128) {
  TDC_DYNAMIC_SHARED(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  unsigned r[4];
  switch (p.mode) {
    case 0:  // half of the block leaves before a block barrier
      if (thread >= 64) return;
      block_sync();
      break;
    case 1:  // a named barrier that too few threads reach
      if (thread < 32) named_barrier_sync(3, 96);
      if (thread >= 96) named_barrier_arrive(3, 96);
      break;
    case 2:  // lanes that leave before a shuffle of their warp
      if (lane >= 16) return;
      shfl_xor(thread, 1);
      break;
    case 3:  // two shuffles in the branches of a warp
      if (lane < 16) {
        shfl_xor(thread, 1);
      } else {
        shfl_xor(thread, 2);
      }
      break;
    case 4:  // two block barriers in the branches of a warp
      if (lane < 16) {
        block_sync();
      } else {
        block_sync();
      }
      break;
    case 5:  // part of a warp at a named barrier
      if (lane < 16) named_barrier_sync(1, 64);
      break;
    case 6:  // two thread counts for one barrier
      named_barrier_arrive(1, thread < 64 ? 128 : 96);
      break;
    case 7:
      store_16(memory + 8, load_16(memory));
      break;
    case 8:
      cp_async_16(memory + 4 * lane, p.in, true);
      break;
    case 9:
      cp_async_16(memory, static_cast<const float*>(p.in) + 1, true);
      break;
    case 10:
      cp_async_16(memory + 1024 - 16 + 16 * lane, p.in, true);
      break;
    case 11:
      ldmatrix_x4(r, memory + 2 * lane);
      break;
    case 12:
      ldmatrix_x4(r, p.in);
      break;
    case 13:
      if (thread == 77) trap();
      break;
    case 14:
      named_barrier_sync(0, 128);
      break;
    case 15:
      named_barrier_sync(1, 100);
      break;
    case 16:  // warps that wait for each other in turn
      named_barrier_sync(thread < 64 ? 1 : 2, 128);
      named_barrier_sync(thread < 64 ? 2 : 1, 128);
      break;
    default:
      break;
  }
}

}  // namespace tdc
