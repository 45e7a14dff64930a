#pragma once

// The emulator's side of cuda/device_sm90.cuh, which includes it.

#include "emulator/async.h"
#include "emulator/device.h"

namespace tdc {

inline unsigned shared_window(const void* shared, TDC_CALLER) {
  const unsigned window = emulator::block.window_of(TDC_SITE("shared_window"), shared);
  return window | static_cast<unsigned>(emulator::block.rank()) << 24;  // as the hardware's addresses
}

// Barriers.

inline void mbarrier_init(Mbarrier* barrier, int count, TDC_CALLER) {
  emulator::block.async().init_barrier(TDC_SITE("mbarrier_init"), barrier, count);
}
inline void mbarrier_init_fence() { emulator::block.async().fence_barriers(); }
inline void mbarrier_arrive(Mbarrier* barrier, TDC_CALLER) {
  emulator::block.async().arrive(TDC_SITE("mbarrier_arrive"), barrier, 0);
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, TDC_CALLER) {
  emulator::block.async().arrive(TDC_SITE("mbarrier_arrive_expect"), barrier, bytes);
}
inline void mbarrier_wait(Mbarrier* barrier, unsigned parity, TDC_CALLER) {
  emulator::block.async().wait(TDC_SITE("mbarrier_wait"), barrier, parity);
}
inline void async_fence() { emulator::block.async().fence(); }

// The cluster.

inline int cluster_rank() { return emulator::block.rank(); }
inline int cluster_blocks() { return emulator::block.blocks(); }
inline void cluster_arrive(TDC_CALLER) { emulator::block.cluster_arrive(TDC_SITE("cluster_arrive")); }
inline void cluster_wait(TDC_CALLER) { emulator::block.cluster_wait(TDC_SITE("cluster_wait")); }
template <class T>
inline T* cluster_shared(T* shared, int rank, TDC_CALLER) {
  return static_cast<T*>(emulator::block.shared_of(TDC_SITE("cluster_shared"), shared, rank));
}

inline void mbarrier_arrive_at(Mbarrier* barrier, int rank, TDC_CALLER) {
  const emulator::Site site = TDC_SITE("mbarrier_arrive_at");
  emulator::block.async().arrive(site, emulator::block.shared_of(site, barrier, rank), 0);
}
// Blocks of a cluster run together: no scope is narrower.
inline void mbarrier_wait_cluster(Mbarrier* barrier, unsigned parity, TDC_CALLER) {
  emulator::block.async().wait(TDC_SITE("mbarrier_wait_cluster"), barrier, parity);
}

// The copy engine.

inline void tensor_map_prefetch(const TensorMap* map, TDC_CALLER) {
  emulator::block.async().decoded_map(TDC_SITE("tensor_map_prefetch"), map);
}

template <int kDimensions>
inline void tma_load(void* to, const TensorMap* map, Mbarrier* barrier, const int (&at)[kDimensions], TDC_CALLER) {
  emulator::block.async().load(TDC_SITE("tma_load"), to, map, barrier, at, kDimensions);
}
template <int kDimensions>
inline void tma_prefetch(const TensorMap* map, const int (&at)[kDimensions], TDC_CALLER) {
  emulator::block.async().prefetch(TDC_SITE("tma_prefetch"), map, at, kDimensions);
}
template <int kDimensions>
inline void tma_store(const TensorMap* map, const void* from, const int (&at)[kDimensions], TDC_CALLER) {
  emulator::block.async().store(TDC_SITE("tma_store"), map, from, at, kDimensions);
}
inline void bulk_commit() { emulator::block.async().commit_stores(); }
template <int kUnread>
inline void bulk_wait_read() {
  emulator::block.async().wait_for_reads(kUnread);
}

// Matrix products.

inline void wgmma_fence(TDC_CALLER) { emulator::block.async().fence_products(TDC_SITE("wgmma_fence")); }
inline void wgmma_commit(TDC_CALLER) { emulator::block.async().commit_products(TDC_SITE("wgmma_commit")); }
template <int kUnderWay>
inline void wgmma_wait(TDC_CALLER) {
  emulator::block.async().wait_for_products(TDC_SITE("wgmma_wait"), kUnderWay);
}
template <int kCount>
inline void wgmma_settle(float (&)[kCount]) {}

template <class T, int kColumns, int kOuterA, int kOuterB>
inline void wgmma(float* d, unsigned long long a, unsigned long long b, unsigned add, TDC_CALLER) {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256, "the widths that there are");
  const emulator::Product product{{a, kOuterA == 1}, {b, kOuterB == 1}, kColumns, kIsHalf<T>, add != 0};
  emulator::block.async().multiply(TDC_SITE("wgmma"), product, d);
}

// The rest.

template <int kRegisters>
inline void registers_give(TDC_CALLER) {
  emulator::block.async().give_registers(TDC_SITE("registers_give"), kRegisters);
}
template <int kRegisters>
inline void registers_take(TDC_CALLER) {
  emulator::block.async().take_registers(TDC_SITE("registers_take"), kRegisters);
}

inline void stmatrix_x4(void* shared_row, const unsigned (&r)[4], TDC_CALLER) {
  const emulator::Site site = TDC_SITE("stmatrix_x4");
  emulator::block.check_shared(site, shared_row, 16, 16);
  emulator::block.note_write(shared_row, 16);
  emulator::MatrixStore own{r, shared_row};
  emulator::block.whole_warp_collective(site, emulator::store_matrices, &own);
}

}  // namespace tdc
