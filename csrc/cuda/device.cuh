#pragma once

// What a kernel may use: one source, three compilers. nvcc and NVRTC compile the PTX below (sm_80 or newer); g++ with
// -DTDC_EMULATOR includes emulator/device.h, which implements the same names on the CPU. No std headers here.
// Besides these names a kernel uses threadIdx, blockIdx, blockDim, gridDim and C's float functions; blocks are 1-D.
// Pointers to shared memory are ordinary pointers: the wrappers convert them to shared-window addresses.
//
//   TDC_KERNEL(name, Params, threads[, blocks[, cluster]]) { ... p ... }
//                                      kernel that takes one plain struct `p`; registers are capped so that `blocks`
//                                      fit on one SM; `cluster` blocks that are neighbours in y form a cluster, from
//                                      sm_90 on (device_sm90.cuh); the emulator registers it by name
//   TDC_DEFINE_KERNEL(name, Params, (function), threads[, blocks[, cluster]])
//                                      a kernel that calls function(p)
//   TDC_SHARED(type, name, count)      static shared array, 16-byte aligned; in the emulator a separate allocation
//   TDC_DYNAMIC_SHARED(name)           `unsigned char* name`: the launch's shared_bytes, 16-byte aligned; in the
//                                      emulator a fresh heap block of exactly that size, so that ASan sees both ends
//   TDC_DYNAMIC_SHARED_1024(name)      the same, 1024-byte aligned
//     The emulator fills shared memory with 0xFF at block start: NaN in every float type, -1 as an integer.
//   TDC_PLANTED(NAME)                  false, unless compiled with -DTDC_PLANT_NAME: a bug that the tests must catch.
//                                      With -DTDC_PLANTS_AT_RUNTIME the emulator is told which one is planted
//
//   bf16, half                         2-byte storage; to_float, from_float<T> (nearest even), pack<T>(low, high)
//   reciprocal                         1 / x within 1 ulp, subnormals as zero; the emulator divides
//   exp_approx                         e^x by ex2.approx, subnormals as zero; the emulator takes expf
//   load_16, store_16                  16 bytes at once, shared or global; the emulator reports a misaligned address
//   keep_before(integer)               what computes or loads it stays before this place in the program
//   prefetch                           asks for the sector of an address in global memory to be brought to the L2; the
//                                      emulator reads a byte there
//   cp_async_16, cp_async_4            asynchronous copy to shared memory, zeros unless `live`; the emulator fills the
//                                      destination with 0xFF at issue and delivers the data in the cp_async_wait that
//                                      covers the group, so a missing wait or a stage still in use is noticed
//   cp_async_commit, cp_async_wait<N>  close a group; wait until at most the N newest groups are in flight (own copies)
//   ldmatrix_x{2,4}[_trans]            8x8 matrices of 16-bit elements, one 16-byte aligned row address per lane
//   mma_16x8x16(d, a, b, bf16()|half()), mma_16x8x8_tf32(d, a, b)   d += a b, fp32 sums, PTX's fragment layout
//   to_tf32                            nearest, ties away; as mma_16x8x8_tf32 expects (it ignores the low 13 bits)
//   block_sync, warp_sync              whole block, whole warp
//   named_barrier_sync|arrive(id, n)   id 1 to 15, n threads in all, a multiple of 32; give id as a constant
//   shfl, shfl_xor, shfl_down, shfl_up, ballot    whole warp, 4-byte values
//   atomic_add_int, atomic_add_float, atomic_max_int    return the old value
//   device_fence                       orders memory between blocks. One block: all threads write, a barrier, then one
//                                      thread has the fence and an atomic. Another: a thread finds the atomic's effect
//                                      by one of its own, then has the fence, then a barrier: all see what was written
//   trap
//     Builds for tests also check every access for races: block_sync, named barriers and warp_sync order memory;
//     shuffles, ballot, ldmatrix and mma do not, and two blocks are ordered by fences around atomics alone.
//     Everything from ldmatrix to ballot is collective: the emulator reports a divergence unless all lanes of the warp
//     make the same call, and a deadlock when threads wait forever or for threads that have exited. The emulator runs
//     blocks one after another, and a thread until it waits: spinning on memory never ends.
//
// Clusters and Hopper's mbarriers, TMA boxes and wgmma are in device_sm90.cuh.

// TDC_PLANTED(X) depends on what TDC_PLANT_X expands to: 1 (planted) gives TDC_PLANT_SHIFT_1, which moves `true` to the
// second argument.
#define TDC_PLANT_SHIFT_1 0,
#define TDC_PLANT_SECOND(first, second, ...) second
#define TDC_PLANT_CHOOSE(...) TDC_PLANT_SECOND(__VA_ARGS__)
#define TDC_PLANT_TEST_(value) TDC_PLANT_CHOOSE(TDC_PLANT_SHIFT_##value true, false, 0)
#define TDC_PLANT_TEST(value) TDC_PLANT_TEST_(value)
#ifdef TDC_PLANTS_AT_RUNTIME
#define TDC_PLANTED(NAME) ::tdc::emulator::is_planted(#NAME)
#else
#define TDC_PLANTED(NAME) TDC_PLANT_TEST(TDC_PLANT_##NAME)
#endif

namespace tdc {

struct bf16 {
  unsigned short bits;
};
struct half {
  unsigned short bits;
};

}  // namespace tdc

#ifdef TDC_EMULATOR
#include "emulator/device.h"
#else

// With three bounds the last one is the cluster, which the host does not see, nor an architecture that has none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TDC_CLUSTER_DIMS(cluster) __cluster_dims__(1, cluster, 1)
#else
#define TDC_CLUSTER_DIMS(cluster)
#endif
#define TDC_BOUNDS_1(threads) __launch_bounds__(threads)
#define TDC_BOUNDS_2(threads, blocks) __launch_bounds__(threads, blocks)
#define TDC_BOUNDS_3(threads, blocks, cluster) __launch_bounds__(threads, blocks) TDC_CLUSTER_DIMS(cluster)
#define TDC_BOUNDS_OF(one, two, three, bounds, ...) bounds
#define TDC_BOUNDS(...) TDC_BOUNDS_OF(__VA_ARGS__, TDC_BOUNDS_3, TDC_BOUNDS_2, TDC_BOUNDS_1, )(__VA_ARGS__)
#define TDC_KERNEL(name, Params, ...) \
  extern "C" __global__ void TDC_BOUNDS(__VA_ARGS__) name(const __grid_constant__ Params p)
#define TDC_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define TDC_DYNAMIC_SHARED(name)                                         \
  extern __shared__ __align__(16) unsigned char tdc_dynamic_shared_16[]; \
  unsigned char* name = tdc_dynamic_shared_16
#define TDC_DYNAMIC_SHARED_1024(name)                                        \
  extern __shared__ __align__(1024) unsigned char tdc_dynamic_shared_1024[]; \
  unsigned char* name = tdc_dynamic_shared_1024

namespace tdc {

// Conversions.

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
__device__ __forceinline__ half from_float<half>(float value) {
  half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two values in one register, the first in the low half, as in memory and in mma fragments.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
  unsigned result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
__device__ __forceinline__ unsigned pack<half>(float low, float high) {
  unsigned result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ unsigned to_tf32(float value) {
  unsigned result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float exp_approx(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value * 1.4426950408889634f));
  return result;
}

// Memory.

__device__ __forceinline__ uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }
__device__ __forceinline__ void store_16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }

__device__ __forceinline__ void keep_before(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ unsigned shared_window(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool live) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_window(shared)), "l"(global),
               "r"(live ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool live) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_window(shared)), "l"(global),
               "r"(live ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// Matrix fragments.

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_window(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_window(shared_row))
               : "memory");
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Synchronisation.

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
__device__ __forceinline__ T shfl(T value, int lane) {
  static_assert(sizeof(T) == 4, "shuffles move 4-byte values");
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "shuffles move 4-byte values");
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <class T>
__device__ __forceinline__ T shfl_down(T value, int delta) {
  static_assert(sizeof(T) == 4, "shuffles move 4-byte values");
  return __shfl_down_sync(0xffffffffu, value, delta);
}
template <class T>
__device__ __forceinline__ T shfl_up(T value, int delta) {
  static_assert(sizeof(T) == 4, "shuffles move 4-byte values");
  return __shfl_up_sync(0xffffffffu, value, delta);
}
__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

__device__ __forceinline__ int atomic_add_int(int* address, int value) { return atomicAdd(address, value); }
__device__ __forceinline__ float atomic_add_float(float* address, float value) { return atomicAdd(address, value); }
__device__ __forceinline__ int atomic_max_int(int* address, int value) { return atomicMax(address, value); }
__device__ __forceinline__ void device_fence() { __threadfence(); }
__device__ __forceinline__ void trap() { __trap(); }

}  // namespace tdc

#endif  // TDC_EMULATOR

#define TDC_DEFINE_KERNEL(name, Params, function, ...) \
  TDC_KERNEL(name, Params, __VA_ARGS__) { function(p); }
