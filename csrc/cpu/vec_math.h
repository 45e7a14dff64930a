// Vectors of floats through the compilers' vector extensions, so that one source serves every instruction set.
//
// Include it only from sources that are compiled once per instruction set: everything here lives in the namespace
// of TDC_FAST_ISA and is inlined, so that no code built for one set can be linked into another.
#pragma once

#include <cstdint>

#define TDC_INLINE inline __attribute__((always_inline))
#define TDC_LAMBDA_INLINE __attribute__((always_inline))

namespace tdc {
namespace TDC_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct BFloat16 {
  uint16_t bits;
};

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef uint32_t Bits __attribute__((vector_size(4 * L)));
  typedef uint16_t Half __attribute__((vector_size(2 * L)));
};

template <int L>
using Float = typename Lanes<L>::Float;

template <int L>
TDC_INLINE Float<L> load(const float* from) {
  Float<L> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <int L>
TDC_INLINE Float<L> load(const BFloat16* from) {
  typename Lanes<L>::Half half;
  __builtin_memcpy(&half, from, sizeof half);
  return (Float<L>)(__builtin_convertvector(half, typename Lanes<L>::Bits) << 16);
}

template <int L>
TDC_INLINE void store(float* to, Float<L> value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Rounds to nearest, ties to even. A NaN stays a NaN: rounding must not carry its mantissa into infinity.
template <int L>
TDC_INLINE void store(BFloat16* to, Float<L> value) {
  typedef typename Lanes<L>::Bits Bits;
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  const Bits is_nan = (Bits)(value != value);
  const auto half = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), typename Lanes<L>::Half);
  __builtin_memcpy(to, &half, sizeof half);
}

// The same value, hidden from the optimiser. A comparison with a hidden value followed by a selection becomes one min
// or max instruction; with a constant that GCC knows it becomes two.
template <int L>
TDC_INLINE Float<L> opaque(Float<L> value) {
#if defined(__x86_64__)
  if constexpr (L >= 4) asm("" : "+x"(value));
#elif defined(__aarch64__)
  if constexpr (L >= 4) asm("" : "+w"(value));
#endif
  return value;
}

// 1 / (1 + exp(-z)), to about 2 ulp. The exponential reaches infinity at z = -88.4, where the exact result is below
// 4e-39; NaN stays NaN.
template <int L>
TDC_INLINE Float<L> sigmoid(Float<L> z) {
  typedef Float<L> F;
  typedef typename Lanes<L>::Bits Bits;
  const F zero = {};
  const F highest = opaque<L>(zero + 88.9f), lowest = opaque<L>(zero - 87.0f);
  F t = -z;
  t = highest < t ? highest : t;  // false for NaN, which stays
  t = t < lowest ? lowest : t;    // below it, adding exp(t) to 1 has no effect
  // exp(t) = 2^n * exp(r) with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits.
  const F shifted = t * 1.44269504088896341f + 12582912.0f;
  const F n = shifted - 12582912.0f;
#if defined(__FP_FAST_FMAF)
  const F r = t - n * 0.693147180559945309f;  // one rounding: off by 2e-9 * n
#else
  F r = t - n * 0.693359375f;  // the leading 9 bits of ln(2): the product is exact
  r = r + n * 2.12194440e-4f;
#endif
  // exp(r) = 1 + r + r^2 q(r): q is the minimax polynomial of degree 4, relative error 4e-9.
  F p = zero + 0x1.6a2256p-10f;
  p = p * r + 0x1.123b02p-7f;
  p = p * r + 0x1.5558f8p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits power = ((Bits)shifted + (127u - 0x4b400000u)) << 23;  // 0x4b400000: bits of 1.5 * 2^23; n = 128: infinity
  return 1.0f / (1.0f + p * (F)power);
}

}  // namespace TDC_FAST_ISA
}  // namespace tdc
