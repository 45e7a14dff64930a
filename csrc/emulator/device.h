#pragma once

// The emulator's side of cuda/device.cuh, which includes it: the same names with the same meaning, on the CPU, for the
// thread that runs now. Each wrapper takes its caller's file and line for messages.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "emulator/block.h"
#include "emulator/matrix.h"
#include "emulator/numbers.h"
#include "emulator/registry.h"

// The CUDA language.

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define threadIdx (::tdc::emulator::block.thread_index())
#define blockIdx (::tdc::emulator::block.block_index())
#define blockDim (::tdc::emulator::block.block_size())
#define gridDim (::tdc::emulator::block.grid_size())

struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned bits) { return tdc::emulator::float_of_bits(bits); }
inline float __int_as_float(int bits) { return tdc::emulator::float_of_bits(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) { return tdc::emulator::bits_of_float(value); }
inline int __float_as_int(float value) { return static_cast<int>(tdc::emulator::bits_of_float(value)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* address) {
  return *address;
}

// Kernels and shared memory.

#define TDC_KERNEL_THREADS(threads, ...) threads
#define TDC_KERNEL_CLUSTER(threads, blocks, cluster, ...) cluster
#define TDC_KERNEL(name, Params, ...)                                                                     \
  extern "C" void name(const Params p);                                                                   \
  static const ::tdc::emulator::Registration name##_registration(                                         \
      {#name, TDC_KERNEL_THREADS(__VA_ARGS__, ), TDC_KERNEL_CLUSTER(__VA_ARGS__, 1, 1, ), sizeof(Params), \
       [](const void* p) { name(*static_cast<const Params*>(p)); }});                                     \
  extern "C" void name(const Params p)

#define TDC_SHARED(type, name, count)                     \
  static const char name##_key = 0;                       \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>( \
      ::tdc::emulator::block.static_shared(&name##_key, sizeof(type) * (count), #name))
#define TDC_DYNAMIC_SHARED(name) unsigned char* name = ::tdc::emulator::block.dynamic_shared()
#define TDC_DYNAMIC_SHARED_1024(name) TDC_DYNAMIC_SHARED(name)

// The caller's place, as trailing parameters of a wrapper.
#define TDC_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define TDC_SITE(operation) \
  ::tdc::emulator::Site { operation, file, line }

namespace tdc {

// Conversions.

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return emulator::bf16_value(value.bits); }
inline float to_float(half value) { return emulator::half_value(value.bits); }

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  return {emulator::bf16_bits(value)};
}
template <>
inline half from_float<half>(float value) {
  return {emulator::half_bits(value)};
}

template <class T>
inline unsigned pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}

inline unsigned to_tf32(float value) { return emulator::tf32_bits(value); }

inline float reciprocal(float value) { return 1.0f / value; }
inline float exp_approx(float value) { return expf(value); }

// Memory.

inline void check_aligned(const emulator::Site& site, const void* address, size_t alignment) {
  const auto remainder = reinterpret_cast<uintptr_t>(address) % alignment;
  if (remainder == 0) return;
  emulator::block.fail(site, "misaligned: the address is " + std::to_string(remainder) + " past a multiple of " +
                                 std::to_string(alignment));
}

inline uint4 load_16(const void* address, TDC_CALLER) {
  check_aligned(TDC_SITE("load_16"), address, 16);
  return *static_cast<const uint4*>(address);
}
inline void store_16(void* address, uint4 value, TDC_CALLER) {
  check_aligned(TDC_SITE("store_16"), address, 16);
  *static_cast<uint4*>(address) = value;
}

inline void keep_before(int&) {}
inline void prefetch(const void* global) { (void)*static_cast<const volatile unsigned char*>(global); }

inline void cp_async_16(void* shared, const void* global, bool live, TDC_CALLER) {
  check_aligned(TDC_SITE("cp_async_16"), global, 16);
  emulator::block.copy(TDC_SITE("cp_async_16"), shared, global, 16, live);
}
inline void cp_async_4(void* shared, const void* global, bool live, TDC_CALLER) {
  check_aligned(TDC_SITE("cp_async_4"), global, 4);
  emulator::block.copy(TDC_SITE("cp_async_4"), shared, global, 4, live);
}
inline void cp_async_commit() { emulator::block.commit_copies(); }
template <int kInFlight>
inline void cp_async_wait() {
  emulator::block.wait_for_copies(kInFlight);
}

// Matrix fragments.

template <int kMatrices, bool kTrans>
inline void ldmatrix(const emulator::Site& site, unsigned (&r)[kMatrices], const void* shared_row) {
  const bool used = emulator::block.lane() < 8 * kMatrices;
  if (used) {
    emulator::block.check_shared(site, shared_row, 16, 16);
    emulator::block.note_read(shared_row, 16);
  }
  emulator::MatrixLoad own{r, shared_row};
  emulator::block.whole_warp_collective(site, emulator::load_matrices<kMatrices, kTrans>, &own);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* shared_row, TDC_CALLER) {
  ldmatrix<4, false>(TDC_SITE("ldmatrix_x4"), r, shared_row);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row, TDC_CALLER) {
  ldmatrix<4, true>(TDC_SITE("ldmatrix_x4_trans"), r, shared_row);
}
inline void ldmatrix_x2(unsigned (&r)[2], const void* shared_row, TDC_CALLER) {
  ldmatrix<2, false>(TDC_SITE("ldmatrix_x2"), r, shared_row);
}
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* shared_row, TDC_CALLER) {
  ldmatrix<2, true>(TDC_SITE("ldmatrix_x2_trans"), r, shared_row);
}

inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16, TDC_CALLER) {
  emulator::MatrixProduct own{d, a, b};
  emulator::block.whole_warp_collective(TDC_SITE("mma_16x8x16"), emulator::product_bf16, &own);
}
inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half, TDC_CALLER) {
  emulator::MatrixProduct own{d, a, b};
  emulator::block.whole_warp_collective(TDC_SITE("mma_16x8x16"), emulator::product_half, &own);
}
inline void mma_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], TDC_CALLER) {
  emulator::MatrixProduct own{d, a, b};
  emulator::block.whole_warp_collective(TDC_SITE("mma_16x8x8_tf32"), emulator::product_tf32, &own);
}

// Synchronisation.

inline void block_sync(TDC_CALLER) {
  emulator::block.barrier(TDC_SITE("block_sync"), 0, static_cast<int>(blockDim.x), true);
}
inline void warp_sync(TDC_CALLER) { emulator::block.warp_sync(TDC_SITE("warp_sync")); }
inline void named_barrier(const emulator::Site& site, int id, int threads, bool wait) {
  if (id < 1 || id >= emulator::kBarriers)
    emulator::block.fail(site, "barrier ids go from 1 to 15, not " + std::to_string(id));
  if (threads <= 0 || threads % emulator::kWarp != 0) {
    emulator::block.fail(site, "a barrier counts whole warps, not " + std::to_string(threads) + " threads");
  }
  emulator::block.barrier(site, id, threads, wait);
}
inline void named_barrier_sync(int id, int threads, TDC_CALLER) {
  named_barrier(TDC_SITE("named_barrier_sync"), id, threads, true);
}
inline void named_barrier_arrive(int id, int threads, TDC_CALLER) {
  named_barrier(TDC_SITE("named_barrier_arrive"), id, threads, false);
}

// The value of the lane that `source` names, or the own one where it names none.
template <class T>
inline T shuffle(const emulator::Site& site, T value, int source) {
  static_assert(sizeof(T) == 4, "shuffles move 4-byte values");
  struct Own {
    T value, result;
    int source;
  } own{value, value, source};
  emulator::block.warp_collective(
      site,
      [](void* const* operands, int lanes) {
        for (int lane = 0; lane < lanes; ++lane) {
          auto& own = *static_cast<Own*>(operands[lane]);
          if (own.source >= 0 && own.source < lanes) own.result = static_cast<Own*>(operands[own.source])->value;
        }
      },
      &own);
  return own.result;
}
template <class T>
inline T shfl(T value, int lane, TDC_CALLER) {
  return shuffle(TDC_SITE("shfl"), value, lane & 31);
}
template <class T>
inline T shfl_xor(T value, int lane_mask, TDC_CALLER) {
  return shuffle(TDC_SITE("shfl_xor"), value, emulator::block.lane() ^ lane_mask);
}
template <class T>
inline T shfl_down(T value, int delta, TDC_CALLER) {
  return shuffle(TDC_SITE("shfl_down"), value, emulator::block.lane() + delta);
}
template <class T>
inline T shfl_up(T value, int delta, TDC_CALLER) {
  return shuffle(TDC_SITE("shfl_up"), value, emulator::block.lane() - delta);
}
inline unsigned ballot(bool predicate, TDC_CALLER) {
  struct Own {
    bool predicate;
    unsigned result;
  } own{predicate, 0};
  emulator::block.warp_collective(
      TDC_SITE("ballot"),
      [](void* const* operands, int lanes) {
        unsigned bits = 0;
        for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(static_cast<Own*>(operands[i])->predicate) << i;
        for (int i = 0; i < lanes; ++i) static_cast<Own*>(operands[i])->result = bits;
      },
      &own);
  return own.result;
}

// A thread runs undisturbed between waits, so plain operations are atomic; the race check is told that they are.
#define TDC_ATOMIC __attribute__((noinline, unused, no_sanitize("thread"))) static
template <class T>
TDC_ATOMIC T exchange(T* address, T value, const void* place) {
  emulator::block.note(address, sizeof(T), emulator::RaceCheck::Access::kAtomic, place);
  const T old = *address;
  *address = value;
  return old;
}
TDC_ATOMIC int atomic_add_int(int* address, int value) {
  const int sum = static_cast<int>(static_cast<unsigned>(*address) + static_cast<unsigned>(value));
  return exchange(address, sum, __builtin_return_address(0));
}
TDC_ATOMIC float atomic_add_float(float* address, float value) {
  return exchange(address, *address + value, __builtin_return_address(0));
}
TDC_ATOMIC int atomic_max_int(int* address, int value) {
  return exchange(address, max(*address, value), __builtin_return_address(0));
}
inline void device_fence() { emulator::block.device_fence(); }
[[noreturn]] inline void trap(TDC_CALLER) { emulator::block.fail(TDC_SITE("trap"), "the kernel trapped"); }

}  // namespace tdc
