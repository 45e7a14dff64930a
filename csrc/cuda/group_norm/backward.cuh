// Group norm backward. With d = x - mean, z the input of the activation and dz = dy * act'(z), two sums over the
// pixels are needed per channel, of dz and of dz * d. Then
//   dshift = S(dz)    dscale = weight * rstd * S(dz d) + bias * S(dz)
//   dx = multiplier * dz - centred * d - constant    with factors of the norm group from the same sums.
// The sample's terms of dweight and dbias go to memory; expert_sums.cuh adds them up, in the same launch or another.
//
//   whole    x and dy are read once and kept in shared memory; dy is read twice where both do not fit
//   partial  where that does not fit: the sums over the block's pixels
//   apply    adds the sums of all runs of pixels, then reads x and dy again
#pragma once

#include "cuda/group_norm/expert_sums.cuh"
#include "cuda/group_norm/forward.cuh"

namespace tdc {

// Per channel of the chunk; the two sums become the group's factors of dx.
struct BackwardArrays {
  float *multiplier, *offset, *centre;  // z = (x - centre) * multiplier + offset
  float *sum_dz, *sum_dz_centred;

  __device__ __forceinline__ BackwardArrays(const GroupNormParams& p, unsigned char* shared)
      : multiplier(reinterpret_cast<float*>(shared + p.channel_arrays)), offset(multiplier + p.chunk_channels),
        centre(offset + p.chunk_channels), sum_dz(centre + p.chunk_channels),
        sum_dz_centred(sum_dz + p.chunk_channels) {}
};

template <class T>
__device__ __forceinline__ void backward_coefficients(const GroupNormParams& p, const NormBlock& block,
                                                      const BackwardArrays& arrays) {
  for (int c = threadIdx.x; c < block.channels; c += blockDim.x) {
    float multiplier = 0, offset = 0, centre = 0;
    if (c < block.live) {
      const long long group =
          static_cast<long long>(block.sample) * p.norm_groups + block.first_group + c / p.channels_per_group;
      const NormCoefficients<T> of(p, block, c);
      centre = p.mean[group];
      multiplier = p.rstd[group] * of.weight * of.gain;
      offset = of.bias * of.gain + of.shift;
    }
    arrays.multiplier[c] = multiplier;
    arrays.offset[c] = offset;
    arrays.centre[c] = centre;
  }
  block_sync();
}

// A thread's coefficients of the V channels from c on.
template <int V>
struct ChannelCoefficients {
  float multiplier[V], offset[V], centre[V];

  __device__ __forceinline__ ChannelCoefficients(const BackwardArrays& arrays, int c) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      multiplier[i] = arrays.multiplier[c + i];
      offset[i] = arrays.offset[c + i];
      centre[i] = arrays.centre[c + i];
    }
  }

  // Turns x into x - mean, and dy into dy * act'(z).
  __device__ __forceinline__ void to_grads(float (&x)[V], float (&dy)[V], bool silu) const {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] -= centre[i];
    if (!silu) return;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float z = x[i] * multiplier[i] + offset[i];
      const float s = norm_sigmoid(z);
      dy[i] *= s * (1.0f + z * (1.0f - s));
    }
  }
};

// Adds dz and dz * d of a pixel to the sums of its channels.
template <class T, int V>
__device__ __forceinline__ void add_grads(const Lanes<T, V>& x, const Lanes<T, V>& dy, const ChannelCoefficients<V>& of,
                                          bool silu, float (&sum)[2][V]) {
  float x_value[V], dy_value[V];
  x.unpack(x_value);
  dy.unpack(dy_value);
  of.to_grads(x_value, dy_value, silu);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sum[0][i] += dy_value[i];
    sum[1][i] += dy_value[i] * x_value[i];
  }
}

// Sums of dz and dz * d per channel over the block's pixels; x stays in the tile when kKeep.
template <class T, int V, bool kTwo, bool kKeep>
__device__ __forceinline__ void sum_grads(const GroupNormParams& p, const NormBlock& block, const NormThread& thread,
                                          const BackwardArrays& arrays, T* x_tile, float* row_sums) {
  constexpr int kLoads = V == 1 ? 4 : 2;  // in flight per thread and tensor
  Input<const T, kTwo> x(p, block, p.x);
  const T* dy = activations<T>(p, block, p.dy);
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V, live = clamped(block.live - c, 0, V);
    float sum[2][V] = {};
    if (live > 0) {
      x.choose(p, block, c, p.x, p.x2);
      const ChannelCoefficients<V> of(arrays, c);
      for (int first = thread.row; first < block.pixels; first += kLoads * thread.rows) {
        Lanes<T, V> x_lanes[kLoads], dy_lanes[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
          const int pixel = first + u * thread.rows;
          x_lanes[u].clear();
          dy_lanes[u].clear();
          if (pixel >= block.pixels) continue;
          x_lanes[u].load(x.at(p, pixel, c));
          dy_lanes[u].load(dy + static_cast<long long>(pixel) * p.channels + c);
        }
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
          const int pixel = first + u * thread.rows;
          if (pixel >= block.pixels) break;
          if (live < V) {
            x_lanes[u].clear_from(live);
            dy_lanes[u].clear_from(live);
          }
          if (kKeep) x_lanes[u].store(x_tile + pixel * block.channels + c);
          add_grads(x_lanes[u], dy_lanes[u], of, p.silu, sum);
        }
      }
    }
    sum_rows<V, 2>(sum, thread, row_sums, arrays.sum_dz + strip, p.chunk_channels, block.channels - strip);
  }
}

// Sums of dz and dz * d per channel over a tile of x and dy.
template <class T, int V>
__device__ __forceinline__ void sum_item_grads(const GroupNormParams& p, const NormBlock& block,
                                               const NormThread& thread, const BackwardArrays& arrays, const T* x_tile,
                                               const T* dy_tile, float* row_sums) {
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V, live = clamped(block.live - c, 0, V);
    float sum[2][V] = {};
    if (live > 0) {
      const ChannelCoefficients<V> of(arrays, c);
#pragma unroll 2
      for (int pixel = thread.row; pixel < block.pixels; pixel += thread.rows) {
        Lanes<T, V> x_lanes, dy_lanes;
        x_lanes.load(x_tile + pixel * block.channels + c);
        dy_lanes.load(dy_tile + pixel * block.channels + c);
        if (live < V) {
          x_lanes.clear_from(live);
          dy_lanes.clear_from(live);
        }
        add_grads(x_lanes, dy_lanes, of, p.silu, sum);
      }
    }
    sum_rows<V, 2>(sum, thread, row_sums, arrays.sum_dz + strip, p.chunk_channels, block.channels - strip);
  }
}

__device__ __forceinline__ float* partial_sums(const GroupNormParams& p, const NormBlock& block, int split, int which) {
  const long long row = (static_cast<long long>(block.sample) * p.splits + split) * 2 + which;
  return p.partials + row * p.channels + block.first_channel;
}

// Adds up the sums of all runs of pixels, in their order: sums_of(run, 0) of dz, sums_of(run, 1) of dz * d.
template <class SumsOf>
__device__ __forceinline__ void merge_sums(const GroupNormParams& p, const NormBlock& block,
                                           const BackwardArrays& arrays, const SumsOf& sums_of) {
  for (int c = threadIdx.x; c < block.live; c += blockDim.x) {
    float sum_dz = 0, sum_dz_centred = 0;
    const int splits = TDC_PLANTED(NORM_DROPS_LAST_RUN) ? p.splits - 1 : p.splits;
#pragma unroll 1
    for (int split = 0; split < splits; ++split) {
      sum_dz += sums_of(split, 0)[c];
      sum_dz_centred += sums_of(split, 1)[c];
    }
    arrays.sum_dz[c] = sum_dz;
    arrays.sum_dz_centred[c] = sum_dz_centred;
  }
  block_sync();
}

// Writes the gradients per channel of channel c, zeros unless `live`.
template <class T>
__device__ __forceinline__ void write_channel_grads(const GroupNormParams& p, const NormBlock& block, int c,
                                                    const BackwardArrays& arrays, float rstd, bool live) {
  const long long at = static_cast<long long>(block.sample) * p.channels + block.first_channel + c;
  float dscale = 0, dshift = 0;
  if (live) {
    const float sum_normal = arrays.sum_dz_centred[c] * rstd;
    const NormCoefficients<T> of(p, block, c);
    dshift = arrays.sum_dz[c];
    dscale = of.weight * sum_normal + of.bias * dshift;
    if (p.dweight_share) p.dweight_share[at] = of.gain * sum_normal;
    if (p.dbias_share) p.dbias_share[at] = of.gain * dshift;
  }
  if (p.dscale) static_cast<T*>(p.dscale)[at] = from_float<T>(dscale);
  if (p.dshift) static_cast<T*>(p.dshift)[at] = from_float<T>(dshift);
}

// From the sums of each channel to the gradients per channel and the factors of dx, one warp per norm group:
// sum_dz becomes `constant`, sum_dz_centred becomes `centred`.
template <class T>
__device__ __forceinline__ void finish_grads(const GroupNormParams& p, const NormBlock& block,
                                             const BackwardArrays& arrays) {
  const int lane = threadIdx.x % kNormWarp, per_group = p.channels_per_group;
  const float count = static_cast<float>(p.pixels) * per_group;
  for (int g = threadIdx.x / kNormWarp; g < block.groups; g += blockDim.x / kNormWarp) {
    const bool live = g < block.live_groups;
    const long long group = static_cast<long long>(block.sample) * p.norm_groups + block.first_group + g;
    const float rstd = live ? p.rstd[group] : 0.0f;
    float constant = 0, centred = 0;
    if (live) {  // the same for the whole warp
#pragma unroll 1
      for (int c = g * per_group + lane; c < (g + 1) * per_group; c += kNormWarp) {
        constant += arrays.multiplier[c] * arrays.sum_dz[c];
        centred += arrays.multiplier[c] * arrays.sum_dz_centred[c];
      }
      constant = warp_sum(constant) / count;
      centred = warp_sum(centred) * rstd * rstd / count;
    }
    warp_sync();
#pragma unroll 1
    for (int c = g * per_group + lane; c < (g + 1) * per_group; c += kNormWarp) {
      if (blockIdx.y == 0) write_channel_grads<T>(p, block, c, arrays, rstd, live);
      arrays.sum_dz[c] = constant;
      arrays.sum_dz_centred[c] = centred;
    }
  }
  block_sync();
}

// What the kernels of one item per block do with a vector's place in the tile once it has been read for the last time;
// streams (stream.cuh) start the copy of their next item's there.
struct NoRefill {
  __device__ __forceinline__ void choose(int) {}  // the vectors that begin at this channel of the chunk come next
  __device__ __forceinline__ void operator()(int) const {}  // of this pixel
};

// Writes dx for the block's pixels, from the tiles or from x and dy themselves; zeros for dead channels.
template <class T, int V, bool kTwo, bool kFromTile, class Refill = NoRefill>
__device__ __forceinline__ void input_grads(const GroupNormParams& p, const NormBlock& block, const NormThread& thread,
                                            const BackwardArrays& arrays, const T* x_tile, const T* dy_tile,
                                            Refill refill = Refill()) {
  // In flight per thread and tensor; more would spill registers.
  constexpr int kLoads = V == 1 ? 4 : V == 4 && kTwo && !kFromTile ? 1 : 2;
  Input<const T, kTwo> x(p, block, p.x);
  const T* dy = activations<T>(p, block, p.dy);
  Input<T, kTwo> dx(p, block, p.dx);
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V, live = clamped(block.live - c, 0, V);
    if (c >= block.channels) break;
    x.choose(p, block, c, p.x, p.x2);
    dx.choose(p, block, c, p.dx, p.dx2);
    refill.choose(c);
    if (kTwo && !dx.first) {  // the gradient of the other part is wanted
      for (int pixel = thread.row; pixel < block.pixels; pixel += thread.rows) refill(pixel);
      continue;
    }
    const ChannelCoefficients<V> of(arrays, c);
    float constant[V], centred[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      constant[i] = arrays.sum_dz[c + i];
      centred[i] = arrays.sum_dz_centred[c + i];
    }
    for (int first = thread.row; first < block.pixels; first += kLoads * thread.rows) {
      Lanes<T, V> x_lanes[kLoads], dy_lanes[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pixel = first + u * thread.rows;
        x_lanes[u].clear();
        dy_lanes[u].clear();
        if (pixel >= block.pixels) continue;
        if (TDC_PLANTED(NORM_REFILLS_EARLY)) refill(pixel);
        if (live == 0) continue;
        if (kFromTile) {
          x_lanes[u].load(x_tile + pixel * block.channels + c);
        } else {
          x_lanes[u].load(x.at(p, pixel, c));
        }
        if (kFromTile && p.keeps_dy) {
          dy_lanes[u].load(dy_tile + pixel * block.channels + c);
        } else {
          dy_lanes[u].load(dy + static_cast<long long>(pixel) * p.channels + c);
        }
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int pixel = first + u * thread.rows;
        if (pixel >= block.pixels) break;
        if (!TDC_PLANTED(NORM_REFILLS_EARLY)) refill(pixel);
        if (live < V) {
          x_lanes[u].clear_from(live);
          dy_lanes[u].clear_from(live);
        }
        float x_value[V], dy_value[V];
        x_lanes[u].unpack(x_value);
        dy_lanes[u].unpack(dy_value);
        of.to_grads(x_value, dy_value, p.silu);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          x_value[i] = dy_value[i] * of.multiplier[i] - x_value[i] * centred[i] - constant[i];
        }
        x_lanes[u].pack_from(x_value);
        x_lanes[u].store(dx.at(p, pixel, c));
      }
    }
  }
}

template <class T, int V, bool kTwo, NormStage kStage>
__device__ __forceinline__ void group_norm_backward(const GroupNormParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  NormBlock block = stage_place<kStage>(p);
  const BackwardArrays arrays(p, shared);
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* x_tile = reinterpret_cast<T*>(shared + p.tile);
  T* dy_tile = x_tile + p.pixels_per_block * p.chunk_channels;
  const bool copies = kStage == NormStage::kWhole && p.keeps_dy;
  const bool early = copies && p.copies_all;

  if (!early) route(p, block);
  if (copies) {
    ItemCopy<T, kTwo, true>(p, block, true, x_tile).template all<V>(thread);
    cp_async_commit();
  }
  if (early) {
    prefetch_sample<T>(p, block);
    prefetch_statistics(p, block);
    route(p, block);
  }
  const bool sums_experts = kStage != NormStage::kPartial && p.counters && blockIdx.y == 0;
  ExpertArrival arrival;
  if (sums_experts) arrival.count(p, block);
  backward_coefficients<T>(p, block, arrays);
  if (copies && !TDC_PLANTED(NORM_WAITS_FOR_NOTHING)) cp_async_wait<0>();
  if (kStage != NormStage::kApply && block.live > 0) {
    if (copies) {
      sum_item_grads<T, V>(p, block, thread, arrays, x_tile, dy_tile, row_sums);
    } else {
      sum_grads<T, V, kTwo, kStage == NormStage::kWhole>(p, block, thread, arrays, x_tile, row_sums);
    }
  }
  if constexpr (kStage == NormStage::kPartial) {
    for (int c = threadIdx.x; c < block.live; c += blockDim.x) {
      partial_sums(p, block, blockIdx.y, 0)[c] = arrays.sum_dz[c];
      partial_sums(p, block, blockIdx.y, 1)[c] = arrays.sum_dz_centred[c];
    }
  } else {
    if (kStage == NormStage::kApply) {
      merge_sums(p, block, arrays, [&](int run, int which) { return partial_sums(p, block, run, which); });
    }
    finish_grads<T>(p, block, arrays);
    if (sums_experts) {
      zero_unused_experts<T>(p, block);
      arrival.arrive(p, block);
    }
    if (p.dx || kTwo) input_grads<T, V, kTwo, kStage == NormStage::kWhole>(p, block, thread, arrays, x_tile, dy_tile);
    if (sums_experts) arrival.finish<T>(p, block);
  }
}

}  // namespace tdc
