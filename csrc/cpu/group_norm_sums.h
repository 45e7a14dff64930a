// Sums over rows of a block for every channel, and of the first and second powers about a pivot.
#pragma once

#include "cpu/group_norm_kernels.h"
#include "cpu/vec_math.h"

namespace tdc {
namespace TDC_FAST_ISA {
namespace {  // internal linkage: code built for one set must never be linked into another

// Sums of K adjacent vectors of channels over the rows. U interleaved partial sums per vector hide the latency of
// the addition and shorten its chain.
template <typename T, int L, int K, int U>
TDC_INLINE void sum_strip(const T* x, int64_t rows, int64_t stride, float* sums) {
  Float<L> partial[U][K] = {};
  int64_t r = 0;
  for (; r + U <= rows; r += U) {
    for (int u = 0; u < U; ++u) {
      for (int k = 0; k < K; ++k) partial[u][k] += load<L>(x + (r + u) * stride + k * L);
    }
  }
  for (; r < rows; ++r) {
    for (int k = 0; k < K; ++k) partial[0][k] += load<L>(x + r * stride + k * L);
  }
  for (int k = 0; k < K; ++k) {
    for (int u = 1; u < U; ++u) partial[0][k] += partial[u][k];
    store<L>(sums + k * L, partial[0][k]);
  }
}

template <typename T, int L>
TDC_INLINE void column_sums(const T* x, int64_t rows, int64_t stride, int64_t live, float* sums) {
  int64_t c = 0;
  for (; c + 8 * L <= live; c += 8 * L) sum_strip<T, L, 8, 1>(x + c, rows, stride, sums + c);
  for (; c + 2 * L <= live; c += 2 * L) sum_strip<T, L, 2, 4>(x + c, rows, stride, sums + c);
  if (c + L <= live) sum_strip<T, L, 1, 8>(x + c, rows, stride, sums + c), c += L;
  if (c < live) sum_strip<T, L, 1, 8>(x + live - L, rows, stride, sums + live - L);
}

// As sum_strip, for the first and second powers of x - pivot.
template <typename T, int L, int K, int U>
TDC_INLINE void centred_strip(const T* x, int64_t rows, int64_t stride, const float* pivot, float* first,
                              float* second) {
  Float<L> centre[K], sum[U][K] = {}, squares[U][K] = {};
  for (int k = 0; k < K; ++k) centre[k] = load<L>(pivot + k * L);
  int64_t r = 0;
  for (; r + U <= rows; r += U) {
    for (int u = 0; u < U; ++u) {
      for (int k = 0; k < K; ++k) {
        const Float<L> d = load<L>(x + (r + u) * stride + k * L) - centre[k];
        sum[u][k] += d;
        squares[u][k] += d * d;
      }
    }
  }
  for (; r < rows; ++r) {
    for (int k = 0; k < K; ++k) {
      const Float<L> d = load<L>(x + r * stride + k * L) - centre[k];
      sum[0][k] += d;
      squares[0][k] += d * d;
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int u = 1; u < U; ++u) sum[0][k] += sum[u][k], squares[0][k] += squares[u][k];
    store<L>(first + k * L, sum[0][k]);
    store<L>(second + k * L, squares[0][k]);
  }
}

template <typename T, int L>
TDC_INLINE void centred_sums(const T* x, int64_t rows, int64_t stride, int64_t live, const float* pivot, float* first,
                             float* second) {
  int64_t c = 0;
  for (; c + 4 * L <= live; c += 4 * L) {
    centred_strip<T, L, 4, 1>(x + c, rows, stride, pivot + c, first + c, second + c);
  }
  for (; c + 2 * L <= live; c += 2 * L) {
    centred_strip<T, L, 2, 2>(x + c, rows, stride, pivot + c, first + c, second + c);
  }
  if (c + L <= live) {
    centred_strip<T, L, 1, 4>(x + c, rows, stride, pivot + c, first + c, second + c);
    c += L;
  }
  if (c < live) {
    c = live - L;
    centred_strip<T, L, 1, 4>(x + c, rows, stride, pivot + c, first + c, second + c);
  }
}

}  // namespace
}  // namespace TDC_FAST_ISA
}  // namespace tdc
