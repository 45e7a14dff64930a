// The two ways in which an operand of the matrix product lies in shared memory, and how each gives mma fragments.
//
// Shared memory holds lines of 16-byte chunks. Chunk c of a line l lies at c ^ f(l), so that the eight rows that one
// phase of ldmatrix reads, and the chunks that a quarter warp writes, fall into different banks:
//
//   DepthInner   line = row of the operand, along it the depth k       x and dy, w forward
//   DepthOuter   line = depth k, along it rows of the operand          w in dgrad; dy and x in wgrad: transposed reads
//
// load() gives 16 rows of the operand at one mma step of depth (32 bytes: 16 or 8 terms) as four registers:
//   r[0] rows 0-7, first half of the depth    r[2] rows 0-7, second half
//   r[1] rows 8-15, first half                r[3] rows 8-15, second half
// which is fragment a of one mma, and fragments b = {r[0], r[2]}, {r[1], r[3]} of two.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/params.h"

namespace tdc {

constexpr int kChunkBytes = 16;
constexpr int kChunksPerStep = 2;  // of depth, in one mma

template <class T>
constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(T));

// mma expects rounded tf32; 16-bit elements need no conversion.
__device__ __forceinline__ unsigned fragment_word(unsigned word, bf16) { return word; }
__device__ __forceinline__ unsigned fragment_word(unsigned word, half) { return word; }
__device__ __forceinline__ unsigned fragment_word(unsigned word, float) { return to_tf32(__uint_as_float(word)); }

template <class T, int kExtent>
struct DepthInner {
  static constexpr int kLines = kExtent, kChunks = kConvDepth / kPerChunk<T>;
  static constexpr int kBytes = kLines * kChunks * kChunkBytes;

  static __device__ __forceinline__ constexpr int offset(int line, int chunk) {
    // Four chunks: two lines share the 32 banks.
    const int swizzled = kChunks == 4 ? chunk ^ ((line >> 1) & 3) : chunk ^ (line & 7);
    return (line * kChunks + swizzled) * kChunkBytes;
  }

  static __device__ __forceinline__ void load(unsigned (&r)[4], const unsigned char* tile, int first, int step,
                                              int lane) {
    const int row = first + lane % 8 + lane / 8 % 2 * 8, chunk = step * kChunksPerStep + lane / 16;
    ldmatrix_x4(r, tile + offset(row, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = fragment_word(r[i], T());
  }
};

template <class T, int kExtent>
struct DepthOuter {
  static constexpr int kLines = kConvDepth, kChunks = kExtent / kPerChunk<T>;
  static constexpr int kBytes = kLines * kChunks * kChunkBytes;

  static __device__ __forceinline__ constexpr int offset(int line, int chunk) {
    return (line * kChunks + (chunk ^ (line & 7))) * kChunkBytes;
  }

  static __device__ __forceinline__ void load(unsigned (&r)[4], const unsigned char* tile, int first, int step,
                                              int lane) {
    const int depth = step * 16 + lane % 8 + lane / 16 * 8, chunk = first / 8 + lane / 8 % 2;
    ldmatrix_x4_trans(r, tile + offset(depth, chunk));
  }
};

// ldmatrix transposes 16-bit elements only: 32-bit ones are read one by one. A warp reads four lines, eight elements
// (two chunks) of each.
template <int kExtent>
struct DepthOuter<float, kExtent> {
  static constexpr int kLines = kConvDepth, kChunks = kExtent / kPerChunk<float>;
  static constexpr int kBytes = kLines * kChunks * kChunkBytes;

  static __device__ __forceinline__ constexpr int offset(int line, int chunk) {
    return (line * kChunks + (chunk ^ (line % 4 * 2))) * kChunkBytes;
  }

  static __device__ __forceinline__ void load(unsigned (&r)[4], const unsigned char* tile, int first, int step,
                                              int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int depth = step * 8 + i / 2 * 4 + lane % 4, row = first + i % 2 * 8 + lane / 4;
      const unsigned char* chunk = tile + offset(depth, row / 4);
      r[i] = to_tf32(reinterpret_cast<const float*>(chunk)[row % 4]);
    }
  }
};

// Whether the adjacent chunks of several lines that a warp reads at once lie in different banks.
template <class Operand>
__device__ constexpr bool fills_banks(int lines, int chunks) {
  for (int line = 0; line < Operand::kLines; line += lines) {
    for (int chunk = 0; chunk < Operand::kChunks; chunk += chunks) {
      unsigned banks = 0;  // groups of four banks: 16 bytes
      for (int i = 0; i < lines * chunks; ++i) {
        banks |= 1u << Operand::offset(line + i / chunks, chunk + i % chunks) / kChunkBytes % 8;
      }
      if (banks != 0xffu) return false;
    }
  }
  return true;
}
static_assert(fills_banks<DepthInner<bf16, 128>>(8, 1) && fills_banks<DepthInner<float, 128>>(8, 1), "ldmatrix");
static_assert(fills_banks<DepthOuter<bf16, 128>>(8, 1) && fills_banks<DepthOuter<bf16, 64>>(8, 1), "ldmatrix, trans");
static_assert(fills_banks<DepthOuter<float, 128>>(4, 2) && fills_banks<DepthOuter<float, 64>>(4, 2), "single words");

// The first `live` elements of a chunk, zeros after them.
template <class T, bool kVector>
__device__ __forceinline__ uint4 partial_chunk(const T* global, int live) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  unsigned words[4] = {0, 0, 0, 0};
  if (kVector) {
    const uint4 whole = load_16(global);
    words[0] = whole.x, words[1] = whole.y, words[2] = whole.z, words[3] = whole.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int kept = live - i * kPerWord;  // elements of this word
      if (kept <= 0) words[i] = 0;
      if (kept == 1 && kPerWord == 2) words[i] &= 0xffffu;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) {
      unsigned bits = 0;
      if (i < live) {
        bits = sizeof(T) == 2 ? reinterpret_cast<const unsigned short*>(global)[i]
                              : reinterpret_cast<const unsigned*>(global)[i];
      }
      words[i / kPerWord] |= bits << i % kPerWord * 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Lines and chunks of an operand that one thread copies: the same chunk of every kLinesApart-th line.
template <class Operand, int kThreads>
struct CopyShare {
  static constexpr int kLinesApart = kThreads / Operand::kChunks;
  static constexpr int kCopies = Operand::kLines / kLinesApart;
  static_assert(kLinesApart * kCopies == Operand::kLines, "the threads share the copies evenly");

  static __device__ __forceinline__ int chunk() { return threadIdx.x % Operand::kChunks; }
  static __device__ __forceinline__ int line(int copy) { return threadIdx.x / Operand::kChunks + copy * kLinesApart; }
  static __device__ __forceinline__ int offset(int copy) { return Operand::offset(line(copy), chunk()); }
};

// Copies a thread's share: its chunk of line i from `from[i]` where bit i of `exists` is set, zeros elsewhere. The
// first `live` elements of a chunk are kept (`live` may be negative or larger than a chunk); the others become zeros
// and, unless 16 bytes are loaded at once, are not read. `base` is any readable address.
template <class Share, bool kVector, class T>
__device__ __forceinline__ void copy_share(unsigned char* shared, const T* base, const T* const (&from)[Share::kCopies],
                                           unsigned exists, int live) {
  if (live <= 0) exists = 0;
  if (kVector && (live <= 0 || live >= kPerChunk<T>)) {
#pragma unroll
    for (int i = 0; i < Share::kCopies; ++i) {
      const bool copied = exists >> i & 1;
      cp_async_16(shared + Share::offset(i), copied ? from[i] : base, copied);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Share::kCopies; ++i) {
      const uint4 chunk = exists >> i & 1 ? partial_chunk<T, kVector>(from[i], live) : make_uint4(0, 0, 0, 0);
      store_16(shared + Share::offset(i), chunk);
    }
  }
}

}  // namespace tdc
