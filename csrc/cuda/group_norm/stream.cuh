// Group norm forward as a stream, for tensors of many chunks: no more blocks than run at once walk over the (sample,
// chunk) items. While a block sums, normalises and writes one item, the copies of its next one are in flight.
//
//   copies    | item 0 | item 1 | item 2 | ...        16 bytes each, to one of two tiles in shared memory, all of an
//   the rest           | item 0 | item 1 | ...        item issued at once: no register waits for memory
//
// A thread copies what it alone reads, so its own wait is all that orders them, and a tile is free again as soon as its
// threads are done with it.
#pragma once

#include "cuda/group_norm/forward.cuh"

namespace tdc {

// Starts the copies of the live part of an item, as one group.
template <class T, int V, bool kTwo>
__device__ __forceinline__ void copy_item(const GroupNormParams& p, const NormBlock& block, const NormThread& thread,
                                          T* tile) {
  Input<const T, kTwo> x(p, block, p.x);
  for (int strip = 0; strip < block.channels; strip += thread.lanes * V) {
    const int c = strip + thread.lane * V;
    if (c >= block.live) break;
    x.choose(p, block, c, p.x, p.x2);
#pragma unroll 4
    for (int pixel = thread.row; pixel < block.pixels; pixel += thread.rows) {
      cp_async_16(tile + pixel * block.channels + c, x.at(p, pixel, c), true);
    }
  }
  cp_async_commit();
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

template <class T, int V, bool kTwo>
__device__ __forceinline__ void group_norm_stream(const GroupNormParams& p) {
  TDC_DYNAMIC_SHARED(shared);
  const NormThread thread(p);
  const ForwardArrays arrays(p, shared);
  float* row_sums = reinterpret_cast<float*>(shared + p.row_sums);
  T* tiles = reinterpret_cast<T*>(shared + p.tile);
  const int tile_elements = p.pixels * p.chunk_channels, items = p.batch * p.chunks;

  zero_counters(p);
  NormBlock block = norm_block(p, blockIdx.x, 0);
  copy_item<T, V, kTwo>(p, block, thread, tiles);
  if (!TDC_PLANTED(NORM_STREAM_NO_FIRST_BARRIER)) block_sync();  // all know their item before the next is looked up
  int turn = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
    NormBlock next = block;
    if (item + static_cast<int>(gridDim.x) < items) {
      next = norm_block(p, item + gridDim.x, 0);
      copy_item<T, V, kTwo>(p, next, thread, tiles + (turn ^ 1) * tile_elements);
    } else {
      // Nothing, so that the wait below is for this item.
      if (!TDC_PLANTED(NORM_STREAM_NO_LAST_GROUP)) cp_async_commit();
    }
    if (TDC_PLANTED(NORM_STREAM_WAITS_FOR_NOTHING)) {
      cp_async_wait<2>();
    } else {
      cp_async_wait<1>();
    }
    T* tile = tiles + (TDC_PLANTED(NORM_STREAM_ONE_TILE) ? 0 : turn) * tile_elements;
    const float count = static_cast<float>(p.pixels) * p.channels_per_group;
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

}  // namespace tdc
