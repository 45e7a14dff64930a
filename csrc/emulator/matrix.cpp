#include "emulator/matrix.h"

#include <cstring>

#include "emulator/numbers.h"

// The operands were checked when the lanes gave them, and these loops take most of the time of an emulated kernel.
#define TDC_UNCHECKED __attribute__((no_sanitize("address", "undefined")))

namespace tdc::emulator {
namespace {

constexpr int kRows = 16, kColumns = 8;
unsigned long long done = 0;  // multiply-adds

// d += a b with one rounding per product, in the order of k.
template <int kDepth>
TDC_UNCHECKED void accumulate(void* const* operands, const float (&a)[kRows][kDepth],
                              const float (&b)[kDepth][kColumns]) {
  done += kRows * kColumns * kDepth;
  for (int half = 0; half < 2; ++half) {
    for (int g = 0; g < 8; ++g) {
      const int row = g + 8 * half;
      float sums[kColumns];
      for (int t = 0; t < 4; ++t) {
        const float* d = static_cast<const MatrixProduct*>(operands[4 * g + t])->d;
        sums[2 * t] = d[2 * half];
        sums[2 * t + 1] = d[2 * half + 1];
      }
      for (int k = 0; k < kDepth; ++k) {
        for (int n = 0; n < kColumns; ++n) sums[n] += a[row][k] * b[k][n];
      }
      for (int t = 0; t < 4; ++t) {
        float* d = static_cast<const MatrixProduct*>(operands[4 * g + t])->d;
        d[2 * half] = sums[2 * t];
        d[2 * half + 1] = sums[2 * t + 1];
      }
    }
  }
}

template <float (*kConvert)(unsigned short)>
TDC_UNCHECKED void product_16(void* const* operands) {
  float a[kRows][16], b[16][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MatrixProduct*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1), k = 2 * t + 8 * (i >> 1);
      a[row][k] = kConvert(static_cast<unsigned short>(own.a[i]));
      a[row][k + 1] = kConvert(static_cast<unsigned short>(own.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * t + 8 * i;
      b[k][g] = kConvert(static_cast<unsigned short>(own.b[i]));
      b[k + 1][g] = kConvert(static_cast<unsigned short>(own.b[i] >> 16));
    }
  }
  accumulate<16>(operands, a, b);
}

}  // namespace

TDC_UNCHECKED void product_bf16(void* const* operands, int) { product_16<bf16_value>(operands); }
TDC_UNCHECKED void product_half(void* const* operands, int) { product_16<half_value>(operands); }

TDC_UNCHECKED void product_tf32(void* const* operands, int) {
  constexpr unsigned kUsed = 0xFFFFE000u;  // the hardware ignores the low 13 bits
  float a[kRows][8], b[8][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MatrixProduct*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = float_of_bits(own.a[i] & kUsed);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of_bits(own.b[i] & kUsed);
  }
  accumulate<8>(operands, a, b);
}

template <int kMatrices, bool kTrans>
TDC_UNCHECKED void load_matrices(void* const* operands, int) {
  for (int m = 0; m < kMatrices; ++m) {
    unsigned short matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[row], static_cast<const MatrixLoad*>(operands[8 * m + row])->shared_row, sizeof(matrix[row]));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const unsigned low = kTrans ? matrix[j][i] : matrix[i][j];
      const unsigned high = kTrans ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<const MatrixLoad*>(operands[lane])->registers[m] = low | high << 16;
    }
  }
}
template void load_matrices<2, false>(void* const*, int);
template void load_matrices<2, true>(void* const*, int);
template void load_matrices<4, false>(void* const*, int);
template void load_matrices<4, true>(void* const*, int);

TDC_UNCHECKED void store_matrices(void* const* operands, int) {
  for (int m = 0; m < 4; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* row = static_cast<unsigned char*>(static_cast<const MatrixStore*>(operands[8 * m + lane / 4])->shared_row);
      std::memcpy(row + lane % 4 * 4, &static_cast<const MatrixStore*>(operands[lane])->registers[m], 4);
    }
  }
}

unsigned long long multiply_adds() { return done; }
void count_multiply_adds(int count) { done += static_cast<unsigned long long>(count); }

}  // namespace tdc::emulator
