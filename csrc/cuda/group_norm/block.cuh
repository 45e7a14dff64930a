// What the group norm kernels share: a block's place in the problem, vectors of channels, and sums over the block.
//
// A block owns a chunk of channels (whole norm groups) of a run of pixels of one sample:
//
//            chunk of channels
//           +--+--+--+--+           2^lanes_log2 neighbouring threads take the vectors of one pixel,
//   pixel 0 |t0|t1|t2|t3|           the next ones those of the next pixel: a thread keeps its channels,
//   pixel 1 |t4|t5|t6|t7|  ...      so sums and coefficients per channel stay in registers. Chunks with
//           +--+--+--+--+           more vectors than threads are taken strip by strip.
#pragma once

#include "cuda/device.cuh"
#include "cuda/group_norm/params.h"

namespace tdc {

constexpr int kNormWarp = 32;
constexpr int kNormThreads = 512;  // most threads of a block

// V neighbouring channels as they lie in memory.
template <class T, int V>
struct Lanes;

template <class T>
struct Lanes<T, 1> {
  T raw;
  __device__ __forceinline__ void load(const T* from) { raw = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = raw; }
  __device__ __forceinline__ void clear() { raw = from_float<T>(0.0f); }
  __device__ __forceinline__ void clear_from(int) {}
  __device__ __forceinline__ void unpack(float (&value)[1]) const { value[0] = to_float(raw); }
  __device__ __forceinline__ void pack_from(const float (&value)[1]) { raw = from_float<T>(value[0]); }
};

template <>
struct Lanes<float, 4> {
  uint4 raw;
  __device__ __forceinline__ void load(const float* from) { raw = load_16(from); }
  __device__ __forceinline__ void store(float* to) const { store_16(to, raw); }
  __device__ __forceinline__ void clear() { raw.x = raw.y = raw.z = raw.w = 0; }
  // Zeros for the channels from `live` on.
  __device__ __forceinline__ void clear_from(int live) {
    if (live <= 1) raw.y = 0;
    if (live <= 2) raw.z = 0;
    if (live <= 3) raw.w = 0;
  }
  __device__ __forceinline__ void unpack(float (&value)[4]) const {
    value[0] = __uint_as_float(raw.x);
    value[1] = __uint_as_float(raw.y);
    value[2] = __uint_as_float(raw.z);
    value[3] = __uint_as_float(raw.w);
  }
  __device__ __forceinline__ void pack_from(const float (&value)[4]) {
    raw.x = __float_as_uint(value[0]);
    raw.y = __float_as_uint(value[1]);
    raw.z = __float_as_uint(value[2]);
    raw.w = __float_as_uint(value[3]);
  }
};

template <class T>
struct Lanes<T, 8> {
  uint4 raw;
  __device__ __forceinline__ void load(const T* from) { raw = load_16(from); }
  __device__ __forceinline__ void store(T* to) const { store_16(to, raw); }
  __device__ __forceinline__ void clear() { raw.x = raw.y = raw.z = raw.w = 0; }
  __device__ __forceinline__ void clear_from(int live) {
    raw.x = live_pair(raw.x, live);
    raw.y = live_pair(raw.y, live - 2);
    raw.z = live_pair(raw.z, live - 4);
    raw.w = live_pair(raw.w, live - 6);
  }
  __device__ __forceinline__ void unpack(float (&value)[8]) const {
    unpack_pair(raw.x, value[0], value[1]);
    unpack_pair(raw.y, value[2], value[3]);
    unpack_pair(raw.z, value[4], value[5]);
    unpack_pair(raw.w, value[6], value[7]);
  }
  __device__ __forceinline__ void pack_from(const float (&value)[8]) {
    raw.x = pack<T>(value[0], value[1]);
    raw.y = pack<T>(value[2], value[3]);
    raw.z = pack<T>(value[4], value[5]);
    raw.w = pack<T>(value[6], value[7]);
  }

 private:
  static __device__ __forceinline__ unsigned live_pair(unsigned pair, int live) {
    return live >= 2 ? pair : live == 1 ? pair & 0xffffu : 0u;
  }
  static __device__ __forceinline__ void unpack_pair(unsigned pair, float& low, float& high) {
    low = to_float(T{static_cast<unsigned short>(pair & 0xffffu)});
    high = to_float(T{static_cast<unsigned short>(pair >> 16)});
  }
};

// Which sample, channels and pixels a block owns. Dead channels are those past the width of the sample's group.
struct NormBlock {
  int sample, expert;
  int first_channel, channels, live;  // of the chunk
  int groups, live_groups;            // norm groups of the chunk
  int first_group;
  int first_pixel, pixels;
};

__device__ __forceinline__ int clamped(int value, int low, int high) { return min(max(value, low), high); }

// The place of chunk item % chunks of sample item / chunks, and a run of pixels. Its expert and live channels are not
// known before memory has answered: all channels count as live.
__device__ __forceinline__ NormBlock norm_place(const GroupNormParams& p, int item, int run) {
  NormBlock block;
  block.sample = item / p.chunks;
  block.expert = 0;
  block.first_channel = (item % p.chunks) * p.chunk_channels;
  block.channels = block.live = min(p.chunk_channels, p.channels - block.first_channel);
  block.groups = block.live_groups = block.channels / p.channels_per_group;
  block.first_group = block.first_channel / p.channels_per_group;
  block.first_pixel = run * p.pixels_per_block;
  block.pixels = min(p.pixels_per_block, p.pixels - block.first_pixel);
  return block;
}

// Looks up the expert and the live channels of the block's sample; none are live where the offsets do not cover it. All
// threads search at once, and ask for what they would find before they know: one wait for memory in all, where a binary
// search would wait at every step. The two barriers also keep `found` from being reused too early.
__device__ __forceinline__ void route(const GroupNormParams& p, NormBlock& block) {
  TDC_SHARED(int, found, 2);
  if (threadIdx.x == 0) found[0] = found[1] = 0;
  block_sync();
  for (int g = threadIdx.x; g < p.num_groups; g += blockDim.x) {
    const int first = p.offsets[g], past = p.offsets[g + 1];
    int expert = p.weight_index[g], live = p.widths ? p.widths[g] : p.channels;
    keep_before(expert), keep_before(live);
    if (first <= block.sample && block.sample < past) {
      found[0] = expert;
      found[1] = live;
    }
  }
  block_sync();
  block.expert = clamped(found[0], 0, p.num_experts - 1);
  block.live_groups = clamped(found[1] / p.channels_per_group - block.first_group, 0, block.groups);
  block.live = block.live_groups * p.channels_per_group;
}

__device__ __forceinline__ NormBlock norm_block(const GroupNormParams& p, int item, int run) {
  NormBlock block = norm_place(p, item, run);
  route(p, block);
  return block;
}

enum class NormStage { kWhole, kPartial, kApply };

// This block's part. The second launch goes through the tensor backwards: it begins with what the first has read last,
// which the L2 cache may still hold.
template <NormStage kStage>
__device__ __forceinline__ NormBlock stage_place(const GroupNormParams& p) {
  if (kStage == NormStage::kApply) return norm_place(p, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y);
  return norm_place(p, blockIdx.x, blockIdx.y);
}

// Start of the block's pixels and channels within a tensor of all channels.
template <class T>
__device__ __forceinline__ T* activations(const GroupNormParams& p, const NormBlock& block, const void* tensor) {
  const long long row = static_cast<long long>(block.sample) * p.pixels + block.first_pixel;
  return static_cast<T*>(const_cast<void*>(tensor)) + row * p.channels + block.first_channel;
}

// An input or its gradient. With two, the channels from x_channels on are those of the second, and a thread chooses the
// one that its vector of channels lies in.
template <class T, bool kTwo>
struct Input {
  T* first;    // of the block's pixels and channels
  int stride;  // from pixel to pixel, of two inputs

  __device__ __forceinline__ Input(const GroupNormParams& p, const NormBlock& block, const void* x)
      : first(activations<T>(p, block, x)) {}

  // For the vector that begins at channel c of the chunk.
  __device__ __forceinline__ void choose(const GroupNormParams& p, const NormBlock& block, int c, const void* x,
                                         const void* x2) {
    if constexpr (kTwo) {
      const bool second = block.first_channel + c >= p.x_channels;
      const long long row = static_cast<long long>(block.sample) * p.pixels + block.first_pixel;
      stride = second ? p.channels - p.x_channels : p.x_channels;
      first = static_cast<T*>(const_cast<void*>(second ? x2 : x));
      if (first) first += row * stride + block.first_channel + c - (second ? p.x_channels : 0);
    }
  }
  __device__ __forceinline__ T* at(const GroupNormParams& p, int pixel, int c) const {
    if constexpr (kTwo) return first + static_cast<long long>(pixel) * stride;
    return first + static_cast<long long>(pixel) * p.channels + c;
  }
};

// A thread's place in the block: which vector of a pixel, and which of the pixels that the block takes at a time.
struct NormThread {
  int lane, lanes, row, rows;

  __device__ __forceinline__ explicit NormThread(const GroupNormParams& p)
      : lane(threadIdx.x & ((1 << p.lanes_log2) - 1)), lanes(1 << p.lanes_log2), row(threadIdx.x >> p.lanes_log2),
        rows(blockDim.x >> p.lanes_log2) {}
};

// Starts copies of the live vectors of a block, straight to the calling thread's places in a tile of x, or of x and dy:
// no register waits for memory. A thread copies what it alone reads, so that its own cp_async_wait is all that orders
// them.
template <class T, bool kTwo, bool kGrads>
class ItemCopy {
 public:
  // Nothing is copied unless `any`.
  __device__ __forceinline__ ItemCopy(const GroupNormParams& p, const NormBlock& block, bool any, T* tile)
      : p_(p), block_(block), any_(any), tile_(tile), x_(p, block, p.x),
        dy_(kGrads ? activations<const T>(p, block, p.dy) : nullptr) {}

  __device__ __forceinline__ void choose(int c) {
    c_ = c;
    live_ = any_ && c < block_.live;
    x_.choose(p_, block_, c, p_.x, p_.x2);
  }
  __device__ __forceinline__ void operator()(int pixel) const {
    if (!live_) return;
    T* to = tile_ + pixel * block_.channels + c_;
    cp_async_16(to, x_.at(p_, pixel, c_), true);
    if constexpr (kGrads) {
      cp_async_16(to + block_.pixels * block_.channels, dy_ + static_cast<long long>(pixel) * p_.channels + c_, true);
    }
  }

  template <int V>
  __device__ __forceinline__ void all(const NormThread& thread) {
    for (int c = thread.lane * V; c < block_.live; c += thread.lanes * V) {
      choose(c);
#pragma unroll 4
      for (int pixel = thread.row; pixel < block_.pixels; pixel += thread.rows) (*this)(pixel);
    }
  }

 private:
  const GroupNormParams& p_;
  const NormBlock& block_;
  bool any_, live_ = false;
  T* tile_;
  Input<const T, kTwo> x_;
  const T* dy_;
  int c_ = 0;
};

// The coefficients of channel c of the chunk. Absent tensors stand for a weight of ones, any other zeros.
template <class T>
struct NormCoefficients {
  float weight = 1, bias = 0, gain = 1, shift = 0;

  __device__ __forceinline__ NormCoefficients(const GroupNormParams& p, const NormBlock& block, int c) {
    const long long of_expert = static_cast<long long>(block.expert) * p.channels + block.first_channel + c;
    const int channel = block.first_channel + c;
    if (p.weight) weight = to_float(static_cast<const T*>(p.weight)[of_expert]);
    if (p.bias) bias = to_float(static_cast<const T*>(p.bias)[of_expert]);
    if (p.scale) gain = 1.0f + to_float(static_cast<const T*>(p.scale)[block.sample * p.scale_stride + channel]);
    if (p.shift) shift = to_float(static_cast<const T*>(p.shift)[block.sample * p.shift_stride + channel]);
  }
};

// Asks for the sample's scale and shift, for which no expert need be known.
template <class T>
__device__ __forceinline__ void prefetch_sample(const GroupNormParams& p, const NormBlock& block) {
  constexpr int kStep = 16 / sizeof(T);
  for (int c = threadIdx.x * kStep; c < block.channels; c += blockDim.x * kStep) {
    const int channel = block.first_channel + c;
    if (p.scale) prefetch(static_cast<const T*>(p.scale) + block.sample * p.scale_stride + channel);
    if (p.shift) prefetch(static_cast<const T*>(p.shift) + block.sample * p.shift_stride + channel);
  }
}

// As this, of mean and rstd.
__device__ __forceinline__ void prefetch_statistics(const GroupNormParams& p, const NormBlock& block) {
  const long long first = static_cast<long long>(block.sample) * p.norm_groups + block.first_group;
  for (int g = threadIdx.x; g < block.live_groups; g += blockDim.x) {
    prefetch(p.mean + first + g);
    prefetch(p.rstd + first + g);
  }
}

// Asks for the coefficients of the block's live channels, so that who reads them later does not wait for memory.
template <class T>
__device__ __forceinline__ void prefetch_coefficients(const GroupNormParams& p, const NormBlock& block) {
  constexpr int kStep = 16 / sizeof(T);  // finer than a sector of the L2, as chunks begin anywhere in one
  for (int c = threadIdx.x * kStep; c < block.live; c += blockDim.x * kStep) {
    const int channel = block.first_channel + c;
    const long long of_expert = static_cast<long long>(block.expert) * p.channels + channel;
    if (p.weight) prefetch(static_cast<const T*>(p.weight) + of_expert);
    if (p.bias) prefetch(static_cast<const T*>(p.bias) + of_expert);
    if (p.scale) prefetch(static_cast<const T*>(p.scale) + block.sample * p.scale_stride + channel);
    if (p.shift) prefetch(static_cast<const T*>(p.shift) + block.sample * p.shift_stride + channel);
  }
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = kNormWarp / 2; distance > 0; distance /= 2) value += shfl_xor(value, distance);
  return value;
}

// Adds up, over the threads that hold the same channels, K sums per channel, always in the same order:
// totals[k * stride + c] for the `width` channels c of the strip. All threads call it; it ends with a barrier.
template <int V, int K>
__device__ __forceinline__ void sum_rows(float (&sum)[K][V], const NormThread& thread, float* row_sums, float* totals,
                                         int stride, int width) {
#pragma unroll
  for (int distance = kNormWarp / 2; distance > 0; distance /= 2) {
    if (distance < thread.lanes) break;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[k][i] += shfl_xor(sum[k][i], distance);
    }
  }
  const bool within_warp = thread.lanes < kNormWarp;
  const int rows = within_warp ? blockDim.x / kNormWarp : thread.rows;
  const int row = within_warp ? threadIdx.x / kNormWarp : thread.row;
  const int columns = thread.lanes * V;
  if (!within_warp || threadIdx.x % kNormWarp < thread.lanes) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) row_sums[(k * rows + row) * columns + thread.lane * V + i] = sum[k][i];
    }
  }
  if (!TDC_PLANTED(NORM_NO_SUM_BARRIER)) block_sync();
  for (int j = threadIdx.x; j < K * columns; j += blockDim.x) {
    const int k = j / columns, c = j % columns;
    if (c >= width) continue;
    float total = 0;
    for (int r = 0; r < rows; ++r) total += row_sums[(k * rows + r) * columns + c];
    totals[k * stride + c] = total;
  }
  block_sync();
}

// 1 / (1 + exp(-z)); for z = -infinity the exponential overflows and the result is 0.
__device__ __forceinline__ float norm_sigmoid(float z) { return reciprocal(1.0f + exp_approx(-z)); }

}  // namespace tdc
