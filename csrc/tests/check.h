// What the C++ test programs share. They stand alone, without torch or a test framework, so that all of the native
// code runs under sanitizers. Buffers are allocated to the exact size: an access past one is an error there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/cpu_isa.h"

namespace tdc_test {

inline int failures = 0;

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++tdc_test::failures;                                                          \
    }                                                                                \
  } while (0)

constexpr int kSkipped = 77;  // the exit status that CTest counts as skipped

// False when TDC_FAST_CPU_ISA names an instruction set that this processor lacks.
inline bool isa_available() {
  try {
    std::printf("instruction set: %s\n", tdc::cpu_isa_name());
    return true;
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return false;
  }
}

// With --plant=NAME the program runs into that error, which proves that the sanitizers are on.
inline bool planted(int argc, char** argv, const char* name) {
  return argc > 1 && std::string(argv[1]) == std::string("--plant=") + name;
}

inline float nan() { return std::numeric_limits<float>::quiet_NaN(); }

inline float round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A buffer of fp32 or bf16 elements behind one interface; fresh ones hold NaN, so that an unwritten output fails.
class Tensor {
 public:
  Tensor(int64_t size, bool bf16) : size_(size), bf16_(bf16), bytes_(size * (bf16 ? 2 : 4)) {
    for (int64_t i = 0; i < size; ++i) set(i, nan());
  }
  void set(int64_t i, float value) {
    uint32_t bits;
    if (bf16_ && value == value) value = round_to_bf16(value);
    std::memcpy(&bits, &value, 4);
    if (bf16_) {
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(bytes_.data() + 2 * i, &half, 2);
    } else {
      std::memcpy(bytes_.data() + 4 * i, &bits, 4);
    }
  }
  float operator[](int64_t i) const {
    uint32_t bits = 0;
    uint16_t half = 0;
    if (bf16_) {
      std::memcpy(&half, bytes_.data() + 2 * i, 2);
      bits = static_cast<uint32_t>(half) << 16;
    } else {
      std::memcpy(&bits, bytes_.data() + 4 * i, 4);
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  int64_t size() const { return size_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  bool same_bits(const Tensor& other) const { return bytes_ == other.bytes_; }

 private:
  int64_t size_;
  bool bf16_;
  std::vector<unsigned char> bytes_;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  int64_t below(int64_t bound) { return static_cast<int64_t>(engine_() % static_cast<uint32_t>(bound)); }
  void fill(Tensor& tensor, float centre = 0, float spread = 1) {
    for (int64_t i = 0; i < tensor.size(); ++i) tensor.set(i, centre + spread * normal());
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

inline int report(const char* program) {
  std::printf("%s: %s\n", program, failures ? "FAILED" : "passed");
  return failures ? 1 : 0;
}

}  // namespace tdc_test
