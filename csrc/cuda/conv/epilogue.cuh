// Writes the sums of the warps to rows of the result in device memory, 16 bytes per thread.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/pipeline.cuh"

namespace tdc {

// Calls write(row, column, values) for every chunk of the tile: kPerChunk adjacent columns, fp32. Each warp passes its
// sums through its own part of shared memory, 16 rows at a time, to turn fragments into rows.
template <class P, class Write>
__device__ __forceinline__ void drain(const typename P::Sums& sums, unsigned char* shared, const Write& write) {
  constexpr int kRows = 16, kPitch = P::kWarpColumns + 8;  // floats; the padding avoids bank conflicts
  constexpr int kValues = kPerChunk<typename P::Element>, kChunks = P::kWarpColumns / kValues;
  static_assert(P::kWarps * kRows * kPitch * 4 <= P::kStages * P::kStageBytes, "the corners fit into the stages");
  const int lane = threadIdx.x % 32;
  float* corner = reinterpret_cast<float*>(shared) + threadIdx.x / 32 * (kRows * kPitch);
#pragma unroll
  for (int i = 0; i < P::kRowFragments; ++i) {
    warp_sync();
#pragma unroll
    for (int j = 0; j < P::kColumnFragments; ++j) {
      float* place = corner + lane / 4 * kPitch + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(place) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(place + 8 * kPitch) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
    warp_sync();
#pragma unroll
    for (int k = lane; k < kRows * kChunks; k += 32) {
      const int row = k / kChunks, column = k % kChunks * kValues;
      float values[kValues];
#pragma unroll
      for (int v = 0; v < kValues; v += 4) {
        const float4 four = *reinterpret_cast<const float4*>(corner + row * kPitch + column + v);
        values[v] = four.x, values[v + 1] = four.y, values[v + 2] = four.z, values[v + 3] = four.w;
      }
      write(P::warp_row() + i * kRows + row, P::warp_column() + column, values);
    }
  }
}

__device__ __forceinline__ void unpack(unsigned word, float (&values)[1], float) { values[0] = __uint_as_float(word); }
template <class T>
__device__ __forceinline__ void unpack(unsigned word, float (&values)[2], T) {
  values[0] = to_float(T{static_cast<unsigned short>(word & 0xffffu)});
  values[1] = to_float(T{static_cast<unsigned short>(word >> 16)});
}

// values += the first `count` elements at an address; `vector`: all 16 bytes may be read.
template <class T>
__device__ __forceinline__ void add_chunk(float (&values)[kPerChunk<T>], const T* global, int count, bool vector) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  if (vector) {
    const uint4 whole = load_16(global);
    const unsigned words[4] = {whole.x, whole.y, whole.z, whole.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float some[kPerWord];
      unpack(words[i], some, T());
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) values[i * kPerWord + j] += some[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) {
      if (i < count) values[i] += to_float(global[i]);
    }
  }
}

__device__ __forceinline__ uint4 packed(const float (&v)[4]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

// Rounds and stores the first `count` values; `vector`: all of them, at a 16-byte aligned address.
template <class T>
__device__ __forceinline__ void store_chunk(T* global, const float (&v)[kPerChunk<T>], int count, bool vector) {
  if (vector) {
    if constexpr (sizeof(T) == 2) {
      store_16(global, make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])));
    } else {
      store_16(global, packed(v));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) {
      if (i < count) global[i] = from_float<T>(v[i]);
    }
  }
}

}  // namespace tdc
