// Vectors of one instruction set: fp32 lanes, bf16 conversion, partial loads and stores, in-register transposition.
// Included only by sources that are compiled once per instruction set (TDC_FAST_ISA names the namespace).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace tdc {
namespace TDC_FAST_ISA {
namespace {  // internal linkage: code built for one set must never be linked into another

#if defined(TDC_FAST_ISA_avx512)
constexpr int kLanes = 16;
#elif defined(TDC_FAST_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// The attributes let a vector alias and start at any element.
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VecU32 __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

using Bf16 = uint16_t;  // the upper half of an fp32

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline VecU16 round_to_bf16(Vec value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 is_nan = (VecU32)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), VecU16);
}

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline Vec load(const Bf16* from) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const VecU16*>(from), VecU32) << 16);
}
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline void store(Bf16* to, Vec value) { *reinterpret_cast<VecU16*>(to) = round_to_bf16(value); }

// The first `count` < kLanes elements; the other lanes are zero and their memory is not touched.
template <typename T>
inline Vec load_partial(const T* from, int count) {
  T lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}
template <typename T>
inline void store_partial(T* to, Vec value, int count) {
  T lanes[kLanes];
  store(lanes, value);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

template <typename T>
inline Vec load_upto(const T* from, int count) {
  return count >= kLanes ? load(from) : load_partial(from, count);
}
template <typename T>
inline void store_upto(T* to, Vec value, int count) {
  if (count >= kLanes)
    store(to, value);
  else
    store_partial(to, value, count);
}

// One butterfly stage: exchanges the off-diagonal blocks of size Step of each pair of rows that are Step apart.
template <int Step, int... I>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  const Vec first = a, second = b;
  a = __builtin_shufflevector(first, second, ((I & Step) == 0 ? I : kLanes + I - Step)...);
  b = __builtin_shufflevector(first, second, ((I & Step) == 0 ? I + Step : kLanes + I)...);
}

template <int Step>
inline void transpose_stage(Vec (&rows)[kLanes]) {
  if constexpr (Step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & Step) == 0) exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kLanes>{});
    transpose_stage<Step / 2>(rows);
  }
}

// rows[i][j] <-> rows[j][i] of a kLanes x kLanes block. Large steps come first, which lets compilers omit most of
// the work for unused results.
inline void transpose(Vec (&rows)[kLanes]) { transpose_stage<kLanes / 2>(rows); }

}  // namespace
}  // namespace TDC_FAST_ISA
}  // namespace tdc
