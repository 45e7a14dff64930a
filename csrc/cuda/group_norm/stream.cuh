// Group norm as a stream, for tensors of many chunks: no more blocks than run at once walk over the (sample, chunk)
// items, with the copies of a block's next item in flight while it works on this one. All copies are 16 bytes each,
// straight to shared memory: no register waits for memory.
//
//   forward     two tiles: the copies of the next item are started before this one is summed, normalised, written
//     copies    | item 0 | item 1 | item 2 | ...
//     the rest           | item 0 | item 1 | ...
//
//   backward    one tile of x and dy: a thread that has read a vector for the last time copies the next item's there
//     copies    | 0 |        | 1    |        | ...
//     sums          | 0 |           | 1 |
//     results            | 0    |        | 1    |
//
// As a thread copies what it alone reads, a place is free again as soon as its thread is done with it.
#pragma once

#include "cuda/group_norm/backward.cuh"

namespace tdc {

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
      finish_group(p, block, arrays, g, live ? block_moments(p, arrays, g, count) : GroupMoments{0, 0, 0},
                   [&](int c) { return affine_of<T>(p, block, c); });
    }
    block_sync();
    normalize<T, V, kTwo, true>(p, block, thread, arrays, tile);
    block = next;
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
    ExpertArrival arrival;
    if (p.counters) arrival.count(p, block);
    backward_coefficients<T>(p, block, arrays);
    if (!TDC_PLANTED(NORM_STREAM_WAITS_FOR_NOTHING)) cp_async_wait<0>();
    if (block.live > 0) sum_item_grads<T, V>(p, block, thread, arrays, x_tile, dy_tile, row_sums);
    finish_grads<T>(p, block, arrays);
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
