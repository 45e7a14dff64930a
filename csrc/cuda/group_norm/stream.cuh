// Group norm as a stream, for tensors of many chunks: no more blocks than run at once walk over the (sample, chunk)
// items, with the copies of a block's next item in flight while it works on this one. All copies are 16 bytes each,
// straight to shared memory: no register waits for memory.
//
//   forward     two tiles: the copies of the next item are started before this one is summed, normalised, written
//     copies    | item 0 | item 1 | item 2 | ...
//     the rest           | item 0 | item 1 | ...
//
//   backward    one tile of x and dy: as soon as a thread has read a vector for the last time, it starts the copy of
//   the
//     copies    | 0 |        | 1    |        | ...     next item's to the same place
//     sums          | 0 |           | 1 |
//     results            | 0    |        | 1    |
//
// A thread copies what it alone reads, so its own wait is all that orders them, and a place is free again as soon as
// its thread is done with it.
#pragma once

#include "cuda/group_norm/backward.cuh"

namespace tdc {

// Starts copies of the live vectors of an item, to the calling thread's places in a tile of x, or of x and dy.
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

template <class T, int V, bool kTwo>
__device__ __forceinline__ void group_norm_stream(const GroupNormParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  const ForwardArrays arrays(p, shared);
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* tiles = reinterpret_cast<T*>(shared + p.tile);
  const int tile_elements = p.pixels * p.chunk_channels, items = p.batch * p.chunks;
  const float count = static_cast<float>(p.pixels) * p.channels_per_group;
  using Copy = ItemCopy<T, kTwo, false>;

  zero_counters(p);
  NormBlock block = norm_block(p, blockIdx.x, 0);
  Copy(p, block, true, tiles).template all<V>(thread);
  cp_async_commit();
  if (!TDC_PLANTED(NORM_STREAM_NO_FIRST_BARRIER)) block_sync();  // all know their item before the next is looked up
  int turn = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const bool more = item + static_cast<int>(gridDim.x) < items;
    NormBlock next = block;
    if (more) {
      next = norm_block(p, item + gridDim.x, 0);
      prefetch_coefficients<T>(p, next);
    }
    T* tile = tiles + turn * tile_elements;
    turn ^= 1;
    if (TDC_PLANTED(NORM_STREAM_ONE_TILE)) turn = 0;
    if (more) Copy(p, next, true, tiles + turn * tile_elements).template all<V>(thread);
    if (more || !TDC_PLANTED(NORM_STREAM_NO_LAST_GROUP)) cp_async_commit();
    if (!TDC_PLANTED(NORM_STREAM_WAITS_FOR_NOTHING)) cp_async_wait<1>();  // for this item
    if (block.live > 0) {
      sum_item<T, V>(block, thread, tile, row_sums, arrays.multiplier);
      group_means(p, block, arrays.multiplier, arrays.centre, count);
      sum_centred<T, V>(block, thread, tile, row_sums, arrays.centre, arrays.multiplier, p.chunk_channels);
    } else {
      block_sync();  // the item before may still be normalised
    }
    for (int g = threadIdx.x / kNormWarp; g < block.groups; g += blockDim.x / kNormWarp) {
      const bool live = g < block.live_groups;
      finish_group<T>(p, block, arrays, g, live ? block_moments(p, arrays, g, count) : GroupMoments{0, 0, 0});
    }
    block_sync();
    normalize<T, V, kTwo, true>(p, block, thread, arrays, tile);
    block = next;
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

// As prefetch_coefficients, of mean and rstd.
__device__ __forceinline__ void prefetch_statistics(const GroupNormParams& p, const NormBlock& block) {
  const long long first = static_cast<long long>(block.sample) * p.norm_groups + block.first_group;
  for (int g = threadIdx.x; g < block.live_groups; g += blockDim.x) {
    prefetch(p.mean + first + g);
    prefetch(p.rstd + first + g);
  }
}

template <class T, int V, bool kTwo>
__device__ __forceinline__ void group_norm_backward_stream(const GroupNormParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  const BackwardArrays arrays(p, shared);
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* x_tile = reinterpret_cast<T*>(shared + p.tile);
  T* dy_tile = x_tile + p.pixels * p.chunk_channels;
  const int items = p.batch * p.chunks;
  using Copy = ItemCopy<T, kTwo, true>;

  NormBlock block = norm_block(p, blockIdx.x, 0);
  Copy(p, block, true, x_tile).template all<V>(thread);
  cp_async_commit();
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const bool more = item + static_cast<int>(gridDim.x) < items;
    // All are done with the item before, and know this one, before the arrays are written and the next is looked up.
    if (!TDC_PLANTED(NORM_STREAM_NO_FIRST_BARRIER)) block_sync();
    NormBlock next = block;
    if (more) {
      next = norm_block(p, item + gridDim.x, 0);
      prefetch_coefficients<T>(p, next);
      prefetch_statistics(p, next);
    }
    backward_coefficients<T>(p, block, arrays);
    if (!TDC_PLANTED(NORM_STREAM_WAITS_FOR_NOTHING)) cp_async_wait<0>();
    if (block.live > 0) sum_item_grads<T, V>(p, block, thread, arrays, x_tile, dy_tile, row_sums);
    finish_grads<T>(p, block, arrays);
    ExpertArrival arrival;
    if (p.counters) {
      zero_unused_experts<T>(p, block);
      arrival.arrive(p, block);
    }
    Copy copy(p, next, more, x_tile);
    if (p.dx || kTwo) {
      input_grads<T, V, kTwo, true>(p, block, thread, arrays, x_tile, dy_tile, copy);
    } else if (more) {
      copy.template all<V>(thread);
    }
    cp_async_commit();
    if (p.counters) arrival.finish<T>(p, block);
    block = next;
  }
}

}  // namespace tdc
