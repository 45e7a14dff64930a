// Group norm forward: y = act(((x - mean) * rstd * weight + bias) * (1 + scale) + shift).
//
//   whole    one block sees all pixels of its chunk: x is read once, kept in shared memory, y written. Its copies start
//            before the block knows its expert and width where dead channels are few or small (`copies_all`), so that a
//            small image waits for memory twice: for x and all that is looked up, then for the expert's weight and bias
//   partial  where that does not fit: the moments of the block's pixels, for `apply` to merge
//   apply    merges the moments of all runs of pixels, then reads x again and writes y
//
// Statistics take two passes over the copy in shared memory: the sum (while x arrives), then squares about that mean.
// The sum of the differences from it shows the rounding error of the mean, which is removed from mean and variance, so
// a mean far larger than the deviation costs no accuracy (the corrected two-pass algorithm: Chan, Golub and LeVeque
// 1983).
#pragma once

#include "cuda/group_norm/block.cuh"

namespace tdc {

constexpr int kMomentFloats = 3;  // pivot, excess, squares: mean = pivot + excess, kept apart to preserve the low bits

// Per channel of the chunk; the sums of the statistics become the coefficients of y.
struct ForwardArrays {
  float *multiplier, *offset, *centre;  // y = act((x - centre) * multiplier + offset)
  float *slope, *base;                  // of `whole`: multiplier = rstd * slope, offset = base, but for rounding

  __device__ __forceinline__ ForwardArrays(const GroupNormParams& p, unsigned char* shared)
      : multiplier(reinterpret_cast<float*>(shared + p.channel_arrays)), offset(multiplier + p.chunk_channels),
        centre(offset + p.chunk_channels), slope(centre + p.chunk_channels), base(slope + p.chunk_channels) {}
};

// act(normalised * slope + base)
struct Affine {
  float slope, base;
};

template <class T>
__device__ __forceinline__ Affine affine_of(const GroupNormParams& p, const NormBlock& block, int c) {
  const NormCoefficients<T> of(p, block, c);
  return {of.weight * of.gain, of.bias * of.gain + of.shift};
}

// Copies the live part of the block's share into the tile and writes the sum of each channel to `totals`.
template <class T, int V, bool kTwo>
__device__ __forceinline__ void load_and_sum(const GroupNormParams& p, const NormBlock& block, const NormThread& thread,
                                             T* tile, float* row_sums, float* totals) {
  constexpr int kLoads = 4;  // in flight per thread
  Input<const T, kTwo> x(p, block, p.x);
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V, live = clamped(block.live - c, 0, V);
    float sum[1][V] = {};
    if (live > 0) {
      x.choose(p, block, c, p.x, p.x2);
      for (int first = thread.row; first < block.pixels; first += kLoads * thread.rows) {
        Lanes<T, V> lanes[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
          const int pixel = first + u * thread.rows;
          lanes[u].clear();
          if (pixel < block.pixels) lanes[u].load(x.at(p, pixel, c));
        }
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
          const int pixel = first + u * thread.rows;
          if (live < V) lanes[u].clear_from(live);
          if (pixel < block.pixels) lanes[u].store(tile + pixel * block.channels + c);
          float value[V];
          lanes[u].unpack(value);
#pragma unroll
          for (int i = 0; i < V; ++i) sum[0][i] += value[i];
        }
      }
    }
    sum_rows<V, 1>(sum, thread, row_sums, totals + strip, 0, block.channels - strip);
  }
}

// From the sums of each channel to the mean of its norm group, in `centre`. One warp per group.
__device__ __forceinline__ void group_means(const GroupNormParams& p, const NormBlock& block, const float* totals,
                                            float* centre, float count) {
  const int lane = threadIdx.x % kNormWarp, per_group = p.channels_per_group;
  for (int g = threadIdx.x / kNormWarp; g < block.groups; g += blockDim.x / kNormWarp) {
    float sum = 0;
    for (int i = lane; i < per_group; i += kNormWarp) sum += totals[g * per_group + i];
    const float mean = warp_sum(sum) / count;
    for (int i = lane; i < per_group; i += kNormWarp) centre[g * per_group + i] = g < block.live_groups ? mean : 0.0f;
  }
  block_sync();
}

// Sums of x - centre and of its square per channel, from the tile. A thread reads only what it wrote.
template <class T, int V>
__device__ __forceinline__ void sum_centred(const NormBlock& block, const NormThread& thread, const T* tile,
                                            float* row_sums, const float* centre, float* first_power, int stride) {
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V;
    float sum[2][V] = {};
    if (c < block.live) {
      float centre_of[V];
#pragma unroll
      for (int i = 0; i < V; ++i) centre_of[i] = centre[c + i];
#pragma unroll 4
      for (int pixel = thread.row; pixel < block.pixels; pixel += thread.rows) {
        Lanes<T, V> lanes;
        lanes.load(tile + pixel * block.channels + c);
        float value[V];
        lanes.unpack(value);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float difference = value[i] - centre_of[i];
          sum[0][i] += difference;
          sum[1][i] += difference * difference;
        }
      }
    }
    sum_rows<V, 2>(sum, thread, row_sums, first_power + strip, stride, block.channels - strip);
  }
}

struct GroupMoments {
  float pivot, excess, squares;  // mean = pivot + excess; squares about the mean
};

// The moments of group g over this block's pixels, in all lanes of the warp.
__device__ __forceinline__ GroupMoments block_moments(const GroupNormParams& p, const ForwardArrays& arrays, int g,
                                                      float count) {
  const int begin = g * p.channels_per_group;
  float first = 0, second = 0;
  for (int i = threadIdx.x % kNormWarp; i < p.channels_per_group; i += kNormWarp) {
    first += arrays.multiplier[begin + i];
    second += arrays.offset[begin + i];
  }
  GroupMoments moments;
  moments.pivot = arrays.centre[begin];
  moments.excess = warp_sum(first) / count;
  const float squares = warp_sum(second) - moments.excess * moments.excess * count;
  moments.squares = squares < 0 ? 0.0f : squares;  // not fmaxf, which would drop NaN
  return moments;
}

__device__ __forceinline__ void put_moments(float* to, const GroupMoments& moments) {
  to[0] = moments.pivot;
  to[1] = moments.excess;
  to[2] = moments.squares;
}

__device__ __forceinline__ float* partial_moments(const GroupNormParams& p, int sample, int split, int group) {
  const long long row = static_cast<long long>(sample) * p.splits + split;
  return p.partials + (row * p.norm_groups + group) * kMomentFloats;
}

__device__ __forceinline__ void write_partial_moments(const GroupNormParams& p, const NormBlock& block,
                                                      const ForwardArrays& arrays, float count) {
  for (int g = threadIdx.x / kNormWarp; g < block.live_groups; g += blockDim.x / kNormWarp) {
    const GroupMoments moments = block_moments(p, arrays, g, count);
    if (threadIdx.x % kNormWarp) continue;
    put_moments(partial_moments(p, block.sample, blockIdx.y, block.first_group + g), moments);
  }
}

// The moments of a group over all runs of pixels, those of a run at moments_of(run), relative to the pivot of the
// first; lanes take runs in turn.
template <class MomentsOf>
__device__ __forceinline__ GroupMoments merged_moments(const GroupNormParams& p, const MomentsOf& moments_of) {
  const int lane = threadIdx.x % kNormWarp;
  GroupMoments merged;
  merged.pivot = *moments_of(0);
  float sum = 0;
#pragma unroll 1
  for (int split = lane; split < p.splits; split += kNormWarp) {
    const float* part = moments_of(split);
    const int pixels = min(p.pixels_per_block, p.pixels - split * p.pixels_per_block);
    sum += ((part[0] - merged.pivot) + part[1]) * (TDC_PLANTED(NORM_ALL_RUNS_ALIKE) ? p.pixels_per_block : pixels);
  }
  merged.excess = warp_sum(sum) / p.pixels;
  float squares = 0;
  const int per_group = p.channels_per_group;
#pragma unroll 1
  for (int split = lane; split < p.splits; split += kNormWarp) {
    const float* part = moments_of(split);
    const int pixels = min(p.pixels_per_block, p.pixels - split * p.pixels_per_block);
    const float difference = ((part[0] - merged.pivot) + part[1]) - merged.excess;
    squares += part[2] + difference * difference * (static_cast<float>(pixels) * per_group);
  }
  merged.squares = warp_sum(squares);
  return merged;
}

// Writes mean and rstd of group g, and the coefficients of its channels, whose affines are affine_at(c). One warp calls
// it.
template <class AffineAt>
__device__ __forceinline__ void finish_group(const GroupNormParams& p, const NormBlock& block,
                                             const ForwardArrays& arrays, int g, const GroupMoments& moments,
                                             const AffineAt& affine_at) {
  const int lane = threadIdx.x % kNormWarp, per_group = p.channels_per_group;
  const bool live = g < block.live_groups;
  const float count = static_cast<float>(p.pixels) * per_group;
  const float mean = live ? moments.pivot + moments.excess : 0.0f;
  const float error = live ? (mean - moments.pivot) - moments.excess : 0.0f;  // what rounding added to the mean
  const float rstd = live ? 1.0f / sqrtf(moments.squares / count + p.eps) : 0.0f;
  if (lane == 0 && blockIdx.y == 0) {
    const long long at = static_cast<long long>(block.sample) * p.norm_groups + block.first_group + g;
    p.mean[at] = mean;
    p.rstd[at] = rstd;
  }
  warp_sync();  // the arrays still held the sums that this warp has read
  for (int c = g * per_group + lane; c < (g + 1) * per_group; c += kNormWarp) {
    float multiplier = 0, offset = 0;
    if (live) {
      const Affine affine = affine_at(c);
      multiplier = rstd * affine.slope;
      offset = affine.base + error * multiplier;
    }
    arrays.multiplier[c] = multiplier;
    arrays.offset[c] = offset;
    arrays.centre[c] = mean;
  }
}

// Writes y for the block's pixels, from the tile or from x itself; zeros for dead channels.
template <class T, int V, bool kTwo, bool kFromTile>
__device__ __forceinline__ void normalize(const GroupNormParams& p, const NormBlock& block, const NormThread& thread,
                                          const ForwardArrays& arrays, const T* tile) {
  constexpr int kLoads = V == 8 && kTwo && !kFromTile ? 2 : 4;  // more would spill registers
  Input<const T, kTwo> x(p, block, p.x);
  T* y = activations<T>(p, block, p.y);
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V, live = clamped(block.live - c, 0, V);
    if (c >= block.channels) break;
    x.choose(p, block, c, p.x, p.x2);
    float centre[V] = {}, multiplier[V] = {}, offset[V] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) {
      centre[i] = arrays.centre[c + i];
      multiplier[i] = arrays.multiplier[c + i];
      offset[i] = arrays.offset[c + i];
    }
    for (int first = thread.row; first < block.pixels; first += kLoads * thread.rows) {
      Lanes<T, V> lanes[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pixel = first + u * thread.rows;
        lanes[u].clear();
        if (pixel >= block.pixels || live == 0) continue;
        if (kFromTile) {
          lanes[u].load(tile + pixel * block.channels + c);
        } else {
          lanes[u].load(x.at(p, pixel, c));
        }
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pixel = first + u * thread.rows;
        if (pixel >= block.pixels) break;
        if (!kFromTile && live < V && !TDC_PLANTED(NORM_READS_DEAD)) lanes[u].clear_from(live);
        float value[V];
        lanes[u].unpack(value);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          value[i] = (value[i] - centre[i]) * multiplier[i] + offset[i];
        }
        if (p.silu) {  // one branch for all channels, so that their special functions overlap
#pragma unroll
          for (int i = 0; i < V; ++i) value[i] *= norm_sigmoid(value[i]);
        }
        lanes[u].pack_from(value);
        lanes[u].store(y + static_cast<long long>(pixel) * p.channels + c);
      }
    }
  }
}

// Sums of each channel over a tile; dead channels that share a vector with live ones become zeros in it.
template <class T, int V>
__device__ __forceinline__ void sum_item(const NormBlock& block, const NormThread& thread, T* tile, float* row_sums,
                                         float* totals) {
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V, live = clamped(block.live - c, 0, V);
    float sum[1][V] = {};
    if (live > 0) {
#pragma unroll 4
      for (int pixel = thread.row; pixel < block.pixels; pixel += thread.rows) {
        T* at = tile + pixel * block.channels + c;
        Lanes<T, V> lanes;
        lanes.load(at);
        if (live < V) {
          lanes.clear_from(live);
          lanes.store(at);
        }
        float value[V];
        lanes.unpack(value);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[0][i] += value[i];
      }
    }
    sum_rows<V, 1>(sum, thread, row_sums, totals + strip, 0, block.channels - strip);
  }
}

// For the backward.
__device__ __forceinline__ void zero_counters(const GroupNormParams& p) {
  if (blockIdx.x > 0 || blockIdx.y > 0) return;
  for (int i = threadIdx.x; i < p.num_counters; i += blockDim.x) p.counters[i] = 0;
}

template <class T, int V, bool kTwo, NormStage kStage>
__device__ __forceinline__ void group_norm_forward(const GroupNormParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  NormBlock block = stage_place<kStage>(p);
  const ForwardArrays arrays(p, shared);
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* tile = reinterpret_cast<T*>(shared + p.tile);
  const float count = static_cast<float>(block.pixels) * p.channels_per_group;
  const bool early = kStage == NormStage::kWhole && p.copies_all;

  if (!early) route(p, block);
  if constexpr (kStage == NormStage::kWhole) {
    ItemCopy<T, kTwo, false>(p, block, true, tile).template all<V>(thread);
    cp_async_commit();
    prefetch_sample<T>(p, block);
  }
  if (kStage != NormStage::kApply) zero_counters(p);
  if (early) route(p, block);
  if constexpr (kStage == NormStage::kWhole) {
    for (int c = threadIdx.x; c < block.live; c += blockDim.x) {
      const Affine affine = affine_of<T>(p, block, c);
      arrays.slope[c] = affine.slope;
      arrays.base[c] = affine.base;
    }
    if (!TDC_PLANTED(NORM_WAITS_FOR_NOTHING)) cp_async_wait<0>();
  }
  if (kStage == NormStage::kApply) prefetch_coefficients<T>(p, block);
  if (kStage != NormStage::kApply && block.live > 0) {
    if (kStage == NormStage::kWhole) {
      sum_item<T, V>(block, thread, tile, row_sums, arrays.multiplier);
    } else {
      load_and_sum<T, V, kTwo>(p, block, thread, tile, row_sums, arrays.multiplier);
    }
    group_means(p, block, arrays.multiplier, arrays.centre, count);
    sum_centred<T, V>(block, thread, tile, row_sums, arrays.centre, arrays.multiplier, p.chunk_channels);
  }
  if constexpr (kStage == NormStage::kPartial) {
    write_partial_moments(p, block, arrays, count);
  } else {
    const auto affine_at = [&](int c) {
      return kStage == NormStage::kWhole ? Affine{arrays.slope[c], arrays.base[c]} : affine_of<T>(p, block, c);
    };
    for (int g = threadIdx.x / kNormWarp; g < block.groups; g += blockDim.x / kNormWarp) {
      GroupMoments moments = {0, 0, 0};
      if (g < block.live_groups) {
        const auto of_run = [&](int run) { return partial_moments(p, block.sample, run, block.first_group + g); };
        moments = kStage == NormStage::kWhole ? block_moments(p, arrays, g, count) : merged_moments(p, of_run);
      }
      finish_group(p, block, arrays, g, moments, affine_at);
    }
    if (!TDC_PLANTED(NORM_NO_COEFFICIENT_BARRIER)) block_sync();
    normalize<T, V, kTwo, kStage == NormStage::kWhole>(p, block, thread, arrays, tile);
  }
}

}  // namespace tdc
