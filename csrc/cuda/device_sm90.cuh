#pragma once

// What a kernel for Hopper (sm_90a) may use beside device.cuh: mbarriers, the copy engine (TMA), wgmma. The emulator's
// side is emulator/device_sm90.h. Where TDC_SM90A is not defined, a kernel has to do without: its body is trap().
//
//   Mbarrier, mbarrier_init(barrier, count)   a barrier in shared memory: a phase ends when `count` arrivals have come
//                                      and all bytes expected have arrived. The emulator reports too many arrivals
//   mbarrier_init_fence                after the init, for copies and other threads; then block_sync
//   mbarrier_arrive(_expect)           one arrival (that also expects bytes of copies)
//   mbarrier_wait(barrier, parity)     until the phase of that parity has ended; parity 1 passes in a fresh barrier
//   async_fence                        orders the thread's own accesses to shared memory before later ones by TMA and
//                                      wgmma (the "async proxy")
//   cluster_rank, cluster_blocks       this block's place among the blocks of its cluster (TDC_KERNEL says how many:
//                                      neighbours in y), and their number
//   cluster_arrive, cluster_wait       the barrier of all threads of the cluster, for whole warps, in two halves: what
//                                      a thread did before it arrives is seen by all that have waited. Every arrival
//                                      has its wait
//   cluster_shared(address, rank)      the same place in the shared memory of another block of the cluster, which
//                                      ordinary loads and stores reach: after one barrier of the cluster, as the other
//                                      may not have begun before, and before another that it waits for, as it ends
//   mbarrier_arrive_at(barrier, rank)  mbarrier_arrive at the same barrier of another block of the cluster, after the
//                                      thread's accesses to shared memory and those that warp_sync ordered before
//   mbarrier_wait_cluster(barrier, parity)   mbarrier_wait for such arrivals, and what came before them
//   tma_load<D>(to, map, barrier, at)  a box whose first element is at[0..D): completes its full size in bytes, also
//                                      where it lies outside of the tensor. `to` is a multiple of 128
//   tma_prefetch<D>(map, at)           the same, into the L2 cache
//   tma_store<D>(map, from, at)        a box, which belongs to the thread's open bulk group
//   bulk_commit, bulk_wait_read<N>     closes the group; until at most the N newest groups have still to read `from`
//   tensor_map_prefetch                the map itself
//   wgmma<T, N, ta, tb>(d, a, b, add)  d (64 x N) (+)= a (64 x 16) b (16 x N), where `add` is not 0 with +; a and b are
//                                      descriptors of shared memory, ta and tb say that k is their outer dimension
//   wgmma_fence, wgmma_commit, wgmma_wait<N>   before the first product after the registers were touched; closes a
//                                      group; until at most the N newest groups are under way
//   wgmma_settle(d)                    keeps the compiler from moving accesses to d before a wgmma_wait
//   registers_give<N>, registers_take<N>       a warpgroup's registers per thread become N, fewer or more
//   stmatrix_x4                        as ldmatrix_x4, the other way
//
// The emulator carries out a copy to shared memory as late as the schedule lets it, a product and the reads of a store
// in the wait that covers them, and fills what is under way with NaN. It reports, whatever the schedule: data touched
// before the wait that covers it, a stage overwritten before its readers have arrived, a missing async_fence,
// wgmma_fence or mbarrier_init_fence, registers taken that nobody gave, stores unread when their thread exits, another
// block's shared memory touched when that need not have begun or may have ended.

#include "cuda/device.cuh"
#include "cuda/tensor_map.h"

namespace tdc {

using Mbarrier = unsigned long long;

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<half> = true;

// A descriptor of a matrix in shared memory with 128-byte swizzle, in two words. The low one has the address and the
// leading offset, the high one the stride offset, in units of 16 bytes; bit 62 says the swizzle. To move a descriptor,
// add bytes / 16 to the low word: addresses stay below 2^18, so nothing is carried.
//
//   k inner    rows of 128 bytes, along them k; eight rows are adjacent, `stride` is from one eight to the next; the
//              leading offset is ignored. 16 further along k: 32 bytes
//   k outer    rows of 128 bytes, along them 64 rows of the matrix (columns of b); eight k are adjacent, `stride` is
//              from one eight to the next, `leading` from 64 rows to the next 64
//
// The first row may be at any multiple of 128 bytes: the hardware swizzles by absolute address, and the base offset
// (bits 49 to 51) stays 0. So a patch of 8 x 8 pixels in a wider box is a matrix whose stride is the width of the box.
// In a cluster an address has the block's rank in bits 24 and on, where a descriptor has other fields: own_window is
// the address without it.
__device__ __forceinline__ constexpr unsigned own_window(unsigned window) { return window & 0x3ffff; }
__device__ __forceinline__ constexpr unsigned descriptor_low(unsigned window, unsigned leading) {
  return window >> 4 | leading >> 4 << 16;
}
__device__ __forceinline__ constexpr unsigned descriptor_high(unsigned stride) { return stride >> 4 | 1u << 30; }
__device__ __forceinline__ constexpr unsigned long long descriptor(unsigned low, unsigned high) {
  return static_cast<unsigned long long>(high) << 32 | low;
}

}  // namespace tdc

#ifdef TDC_EMULATOR
#define TDC_SM90A
#include "emulator/device_sm90.h"
#else
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define TDC_SM90A
#endif

namespace tdc {

// Barriers.

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_window(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_window(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_window(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_window(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The cluster.

__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <class T>
__device__ __forceinline__ T* cluster_shared(T* shared, int rank) {
  unsigned long long there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(there);
}

__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_window(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(Mbarrier* barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_window(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// The copy engine.

__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Where a box begins, in the text of an instruction: operands 0 to kDimensions - 1.
#define TDC_TMA_BY_DIMENSIONS(INSTRUCTION)                                                                      \
  static_assert(kDimensions >= 3 && kDimensions <= 5, "a tensor map has 3 to 5 dimensions");                    \
  if constexpr (kDimensions == 3) {                                                                             \
    INSTRUCTION("3d", "{%0, %1, %2}", "%3", "%4", "%5", "r"(at[0]), "r"(at[1]), "r"(at[2]));                    \
  } else if constexpr (kDimensions == 4) {                                                                      \
    INSTRUCTION("4d", "{%0, %1, %2, %3}", "%4", "%5", "%6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));    \
  } else {                                                                                                      \
    INSTRUCTION("5d", "{%0, %1, %2, %3, %4}", "%5", "%6", "%7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), \
                "r"(at[4]));                                                                                    \
  }

template <int kDimensions>
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, Mbarrier* barrier,
                                         const int (&at)[kDimensions]) {
#define TDC_TMA_LOAD(rank, box, a, b, c, ...)                                                                   \
  asm volatile("cp.async.bulk.tensor." rank ".shared::cluster.global.mbarrier::complete_tx::bytes [" a "], [" b \
               ", " box "], [" c "];" ::__VA_ARGS__,                                                            \
               "r"(shared_window(to)), "l"(map), "r"(shared_window(barrier))                                    \
               : "memory")
  TDC_TMA_BY_DIMENSIONS(TDC_TMA_LOAD)
#undef TDC_TMA_LOAD
}

template <int kDimensions>
__device__ __forceinline__ void tma_prefetch(const TensorMap* map, const int (&at)[kDimensions]) {
#define TDC_TMA_PREFETCH(rank, box, a, b, c, ...) \
  asm volatile("cp.async.bulk.prefetch.tensor." rank ".L2.global [" a ", " box "];" ::__VA_ARGS__, "l"(map))
  TDC_TMA_BY_DIMENSIONS(TDC_TMA_PREFETCH)
#undef TDC_TMA_PREFETCH
}

template <int kDimensions>
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* from, const int (&at)[kDimensions]){
#define TDC_TMA_STORE(rank, box, a, b, c, ...)                                                                         \
  asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.bulk_group [" a ", " box "], [" b "];" ::__VA_ARGS__, \
               "l"(map), "r"(shared_window(from))                                                                      \
               : "memory")
    TDC_TMA_BY_DIMENSIONS(TDC_TMA_STORE)
#undef TDC_TMA_STORE
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kUnread>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kUnread) : "memory");
}

// Matrix products.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kUnderWay>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnderWay) : "memory");
}
template <int kCount>
__device__ __forceinline__ void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The instruction names every register of d, so that each width is written out: TDC_WGMMA(columns, element, registers
// in the text, operands, the numbers of a, b, add, ta, tb).
#define TDC_WGMMA_TEXT(columns, element, registers, a, b, add, ta, tb)                                          \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." element \
  "." element " {" registers "}, " a ", " b ", p, 1, 1, " ta ", " tb ";\n}"
#define TDC_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TDC_TEXT_24 TDC_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TDC_TEXT_32 TDC_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TDC_TEXT_48 TDC_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TDC_TEXT_64 TDC_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TDC_TEXT_72 TDC_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define TDC_TEXT_96                                                                                             \
  TDC_TEXT_64                                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TDC_SUM(i) "+f"(d[i])
#define TDC_SUMS_8(i)                                                                                         \
  TDC_SUM(i), TDC_SUM(i + 1), TDC_SUM(i + 2), TDC_SUM(i + 3), TDC_SUM(i + 4), TDC_SUM(i + 5), TDC_SUM(i + 6), \
      TDC_SUM(i + 7)
#define TDC_SUMS_16(i) TDC_SUMS_8(i), TDC_SUMS_8(i + 8)
#define TDC_SUMS_32(i) TDC_SUMS_16(i), TDC_SUMS_16(i + 16)
#define TDC_WGMMA(columns, element, text, ta_, tb_, na, nb, nadd, nta, ntb, ...) \
  asm volatile(TDC_WGMMA_TEXT(columns, element, text, na, nb, nadd, nta, ntb)    \
               : __VA_ARGS__                                                     \
               : "l"(a), "l"(b), "r"(add), "n"(ta_), "n"(tb_))

template <class T, int kColumns, int kOuterA, int kOuterB>
__device__ __forceinline__ void wgmma(float* d, unsigned long long a, unsigned long long b, unsigned add) {
  static_assert(kColumns == 32 || kColumns == 48 || kColumns == 64 || kColumns == 96 || kColumns == 128 ||
                    kColumns == 144 || kColumns == 192,
                "the widths written out");
#define TDC_WGMMA_OF(element)                                                                                  \
  if constexpr (kColumns == 32) {                                                                              \
    TDC_WGMMA(32, element, TDC_TEXT_16, kOuterA, kOuterB, "%16", "%17", "%18", "%19", "%20", TDC_SUMS_16(0));  \
  } else if constexpr (kColumns == 48) {                                                                       \
    TDC_WGMMA(48, element, TDC_TEXT_24, kOuterA, kOuterB, "%24", "%25", "%26", "%27", "%28", TDC_SUMS_16(0),   \
              TDC_SUMS_8(16));                                                                                 \
  } else if constexpr (kColumns == 64) {                                                                       \
    TDC_WGMMA(64, element, TDC_TEXT_32, kOuterA, kOuterB, "%32", "%33", "%34", "%35", "%36", TDC_SUMS_32(0));  \
  } else if constexpr (kColumns == 96) {                                                                       \
    TDC_WGMMA(96, element, TDC_TEXT_48, kOuterA, kOuterB, "%48", "%49", "%50", "%51", "%52", TDC_SUMS_32(0),   \
              TDC_SUMS_16(32));                                                                                \
  } else if constexpr (kColumns == 128) {                                                                      \
    TDC_WGMMA(128, element, TDC_TEXT_64, kOuterA, kOuterB, "%64", "%65", "%66", "%67", "%68", TDC_SUMS_32(0),  \
              TDC_SUMS_32(32));                                                                                \
  } else if constexpr (kColumns == 144) {                                                                      \
    TDC_WGMMA(144, element, TDC_TEXT_72, kOuterA, kOuterB, "%72", "%73", "%74", "%75", "%76", TDC_SUMS_32(0),  \
              TDC_SUMS_32(32), TDC_SUMS_8(64));                                                                \
  } else {                                                                                                     \
    TDC_WGMMA(192, element, TDC_TEXT_96, kOuterA, kOuterB, "%96", "%97", "%98", "%99", "%100", TDC_SUMS_32(0), \
              TDC_SUMS_32(32), TDC_SUMS_32(64));                                                               \
  }
  if constexpr (kIsHalf<T>) {
    TDC_WGMMA_OF("f16")
  } else {
    TDC_WGMMA_OF("bf16")
  }
#undef TDC_WGMMA_OF
}

// The rest.

template <int kRegisters>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void stmatrix_x4(void* shared_row, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_window(shared_row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace tdc

#endif  // TDC_EMULATOR
