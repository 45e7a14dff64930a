#pragma once

#include <cstdint>
#include <cstring>

namespace tdc::emulator {

// Conversions as the hardware's cvt instructions make them: nearest, ties to even, every NaN becomes 0x7FFF.

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float bf16_value(unsigned short bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

inline unsigned short bf16_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<unsigned short>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline float half_value(unsigned short bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | magnitude << 13);  // infinity, NaN
  // Scaling by 2^112 moves the exponent's bias from 15 to 127, exactly, for subnormals too.
  const float scaled = float_of_bits(magnitude << 13) * float_of_bits((127u + 112u) << 23);
  return float_of_bits(sign | bits_of_float(scaled));
}

inline unsigned short half_bits(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return 0x7FFF;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the last place is 2^-24: adding 0.5 puts it at the end of a float, and the addition rounds.
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return sign | static_cast<unsigned short>(bits_of_float(shifted) - 0x3F000000u);
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return sign | static_cast<unsigned short>((rounded - ((127u - 15u) << 23)) >> 13);
}

// cvt.rna.tf32.f32: 10 bits of mantissa, nearest, ties away from zero.
inline uint32_t tf32_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFFFFFu;
  if ((bits & 0x7FFFFFFFu) == 0x7F800000u) return bits;
  return (bits + 0x1000u) & 0xFFFFE000u;
}

}  // namespace tdc::emulator
