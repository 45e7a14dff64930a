// wgrad: dweight[co, tap, ci] = sum over the samples of an expert and the pixels of y of dy[pixel, co] x[its tap, ci].
//
//   rows of the tile     output channels of the expert's weight
//   columns              input channels, of x or of x2, at one tap
//   depth                pixels of y of all groups that use the expert, group after group, kConvDepth at a time
//
// Split-K: split s of S takes the s-th equal share of every group's steps and writes its own partial array; a second
// launch adds those in order, so the result does not depend on timing. Further blocks sum dy over the same shares,
// which is dbias.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/channel_sums.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/pipeline.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

// What one block sums.
struct ConvWgradTile {
  int split, expert, tap, first_out, first_in;
  int origin, end_in;  // of the input channels, where those of the tensor that holds the tile begin and end

  template <class Tile>
  __device__ __forceinline__ static ConvWgradTile find(const ConvWgradParams& p) {
    // Blocks that read the same pixels are neighbours, so that the pixels are in the L2 cache.
    const int taps = p.geometry.filter_height * p.geometry.filter_width;
    unsigned block = blockIdx.x;
    ConvWgradTile tile;
    tile.first_in = block % p.in_tiles * Tile::kColumns;
    tile.origin = 0, tile.end_in = p.geometry.x_channels;
    if (tile.first_in >= p.geometry.x_channels) {
      const int tiles_of_x = (p.geometry.x_channels + Tile::kColumns - 1) / Tile::kColumns;
      tile.first_in += p.geometry.x_channels - tiles_of_x * Tile::kColumns;
      tile.origin = p.geometry.x_channels, tile.end_in = p.geometry.in_channels;
    }
    block /= p.in_tiles;
    tile.first_out = block % p.out_tiles * Tile::kRows;
    block /= p.out_tiles;
    tile.tap = block % taps;
    block /= taps;
    tile.expert = block % p.routing.num_experts;
    tile.split = block / p.routing.num_experts;
    return tile;
  }
};

// Pixels of y, counted through the batch.
struct ConvPixels {
  int first, end;
};

// The share of a split in the pixels of a group, in whole steps but for the group's last.
__device__ __forceinline__ ConvPixels share_of_group(const ConvWgradParams& p, int group, int split) {
  const int pixels = static_cast<int>(p.by_pixels.divisor);
  const int first = clamp_to(p.routing.offsets[group], p.routing.batch) * pixels;
  const int past = clamp_to(p.routing.offsets[group + 1], p.routing.batch) * pixels;
  const long long steps = (past - first + kConvDepth - 1) / kConvDepth;
  return {first + static_cast<int>(steps * split / p.splits) * kConvDepth,
          min(past, first + static_cast<int>(steps * (split + 1) / p.splits) * kConvDepth)};
}

// The steps of a block, and the largest number of live channels in any of them.
struct ConvWgradWork {
  int steps, live_out, live_in;
};

// Walks over the pixels of y that a block sums: its split of every group that uses the expert and has live channels in
// the tile.
class ConvPixelWalk {
 public:
  __device__ __forceinline__ ConvPixelWalk(const ConvWgradParams& p, const ConvWgradTile& tile) : p_(p), tile_(tile) {
    next_group();
  }

  // The pixels of a step are pixel() .. end(), counted through the batch; empty at the end of the walk.
  __device__ __forceinline__ int pixel() const { return pixel_; }
  __device__ __forceinline__ int end() const { return end_; }
  __device__ __forceinline__ int live_out() const { return live_out_; }
  __device__ __forceinline__ int live_in() const { return live_in_; }

  __device__ __forceinline__ void advance() {
    pixel_ += kConvDepth;
    if (pixel_ >= end_) next_group();
  }

  // Counts what is left of the walk and ends it.
  __device__ __forceinline__ ConvWgradWork count() {
    ConvWgradWork work = {0, 0, 0};
    for (; pixel_ < end_; next_group()) {
      work.steps += (end_ - pixel_ + kConvDepth - 1) / kConvDepth;
      work.live_out = max(work.live_out, live_out_);
      work.live_in = max(work.live_in, live_in_);
    }
    return work;
  }

 private:
  __device__ __forceinline__ void next_group() {
    const ConvRouting& routing = p_.routing;
    pixel_ = end_ = 0;
    for (++group_; group_ < routing.num_groups; ++group_) {
      if (expert_of_group(routing, group_) != tile_.expert) continue;
      live_out_ = live_width(routing.out_widths, group_, p_.geometry.out_channels);
      live_in_ = min(live_width(routing.in_widths, group_, p_.geometry.in_channels), tile_.end_in);
      if (tile_.first_out >= live_out_ || tile_.first_in >= live_in_) continue;
      const ConvPixels share = share_of_group(p_, group_, tile_.split);
      pixel_ = share.first, end_ = share.end;
      if (pixel_ < end_) return;
    }
  }

  const ConvWgradParams& p_;
  const ConvWgradTile& tile_;
  int group_ = -1, pixel_ = 0, end_ = 0, live_out_ = 0, live_in_ = 0;
};

// Copies rows of dy and the pixels of x that the tap pairs with them.
template <class P, bool kVector>
class ConvWgradLoader {
  using T = typename P::Element;
  using Grads = typename P::ShareA;
  using Pixels = typename P::ShareB;

 public:
  __device__ __forceinline__ ConvWgradLoader(const ConvWgradParams& p, const ConvWgradTile& tile)
      : p_(p), tile_(tile), walk_(p, tile) {
    const int tap = tile.tap + (TDC_PLANTED(CONV_WRONG_TAP) ? 1 : 0);
    top_ = tap / p.geometry.filter_width - p.geometry.pad_height;
    left_ = tap % p.geometry.filter_width - p.geometry.pad_width;
  }

  __device__ __forceinline__ void load(unsigned char* stage) {
    load_grads(stage);
    load_pixels(stage + P::A::kBytes);
    walk_.advance();
  }

 private:
  __device__ __forceinline__ void load_grads(unsigned char* shared) {
    const T* dy = static_cast<const T*>(p_.dy);
    const int channel = tile_.first_out + Grads::chunk() * kPerChunk<T>;
    const T* from[Grads::kCopies];
    unsigned exists = 0;
#pragma unroll
    for (int i = 0; i < Grads::kCopies; ++i) {
      const int pixel = walk_.pixel() + Grads::line(i);
      from[i] = dy + (static_cast<long long>(pixel) * p_.geometry.out_channels + channel);
      exists |= pixel < walk_.end() ? 1u << i : 0u;
    }
    copy_share<Grads, kVector>(shared, dy, from, exists, walk_.live_out() - channel);
  }

  __device__ __forceinline__ void load_pixels(unsigned char* shared) {
    const ConvGeometry& g = p_.geometry;
    const T* x = static_cast<const T*>(tile_.origin ? p_.x2 : p_.x);
    const int channel = tile_.first_in + Pixels::chunk() * kPerChunk<T>, up = g.upsample_log2;
    const int channels = tile_.end_in - tile_.origin;
    const T* from[Pixels::kCopies];
    unsigned exists = 0;
#pragma unroll
    for (int i = 0; i < Pixels::kCopies; ++i) {
      const int pixel = walk_.pixel() + Pixels::line(i), sample = quotient(pixel, p_.by_pixels);
      const int within = pixel - sample * static_cast<int>(p_.by_pixels.divisor);
      const int out_row = quotient(within, p_.by_width), out_column = within - out_row * g.out_width;
      const int row = out_row * g.stride_height + top_, column = out_column * g.stride_width + left_;
      const bool inside = pixel < walk_.end() && static_cast<unsigned>(row) < static_cast<unsigned>(g.height << up) &&
                          static_cast<unsigned>(column) < static_cast<unsigned>(g.width << up);
      const int source = inside ? (sample * g.height + (row >> up)) * g.width + (column >> up) : 0;
      from[i] = x + (static_cast<long long>(source) * channels + channel - tile_.origin);
      exists |= inside ? 1u << i : 0u;
    }
    copy_share<Pixels, kVector>(shared, x, from, exists, walk_.live_in() - channel);
  }

  const ConvWgradParams& p_;
  const ConvWgradTile& tile_;
  ConvPixelWalk walk_;
  int top_, left_;  // the pixel of x that the tap pairs with pixel (0, 0) of y
};

// What a block from weight_blocks on does.
template <class T, int kThreads>
__device__ __forceinline__ void sum_bias(const ConvWgradParams& p, float* rows) {
  using Sums = ConvSumBlock<T, kThreads, kBiasSumChunks>;
  const int block = blockIdx.x - p.weight_blocks, experts = p.routing.num_experts, channels = p.geometry.out_channels;
  const int first = block % p.bias_tiles * Sums::kChannels, channel = first + Sums::channel();
  const int expert = block / p.bias_tiles % experts, split = block / p.bias_tiles / experts;

  float sums[kPerChunk<T>] = {};
  for (int group = 0; group < p.routing.num_groups; ++group) {
    if (expert_of_group(p.routing, group) != expert) continue;
    const ConvPixels share = share_of_group(p, group, split);
    const int live = live_width(p.routing.out_widths, group, channels) - channel;
    Sums::add_pixels(sums, static_cast<const T*>(p.dy) + channel, channels, share.first, share.end, live,
                     p.vector_grads);
  }
  Sums::reduce(sums, rows);
  for (int i = threadIdx.x; i < Sums::kChannels && first + i < channels; i += kThreads) {
    const long long place = static_cast<long long>(expert) * channels + first + i;
    if (p.splits == 1) {
      static_cast<T*>(p.dbias)[place] = from_float<T>(rows[i]);
    } else {
      p.bias_partials[static_cast<long long>(split) * experts * channels + place] = rows[i];
    }
  }
}

// kVector: the channels of x and of dy are whole, aligned chunks of 16 bytes.
template <class T, class Tile, bool kVector>
__device__ __forceinline__ void conv_wgrad(const ConvWgradParams& p) {
  using P = ConvProduct<T, Tile, DepthOuter, DepthOuter>;
  TDC_DYNAMIC_SHARED(shared);
  if (blockIdx.x >= static_cast<unsigned>(p.weight_blocks)) {
    static_assert(ConvSumBlock<T, Tile::kThreads, kBiasSumChunks>::kBytes <= P::kStages * P::kStageBytes,
                  "the sums fit");
    sum_bias<T, Tile::kThreads>(p, reinterpret_cast<float*>(shared));
    return;
  }
  const ConvWgradTile tile = ConvWgradTile::find<Tile>(p);

  typename P::Sums sums = {};
  {
    ConvWgradLoader<P, kVector> loader(p, tile);
    const ConvWgradWork work = ConvPixelWalk(p, tile).count();
    const bool live = tile.first_out + P::warp_row() < work.live_out && tile.first_in + P::warp_column() < work.live_in;
    run_pipeline<P>(loader, work.steps, live, shared, sums);
  }

  const ConvGeometry& g = p.geometry;
  const int taps = g.filter_height * g.filter_width;
  const long long experts_before = static_cast<long long>(tile.split) * p.routing.num_experts + tile.expert;
  drain<P>(sums, shared, [&](int row, int column, float (&values)[kPerChunk<T>]) {
    const int out = tile.first_out + row, in = tile.first_in + column, count = tile.end_in - in;
    if (out >= g.out_channels || count <= 0) return;
    if (p.splits == 1) {
      const long long place =
          ((static_cast<long long>(tile.expert) * g.out_channels + out) * taps + tile.tap) * g.in_channels + in;
      store_chunk(static_cast<T*>(p.dweight) + place, values, count, p.vector_result);
    } else {
      const long long place = ((experts_before * g.out_channels + out) * taps + tile.tap) * g.in_channels + in;
#pragma unroll
      for (int v = 0; v < kPerChunk<T>; v += 4) {
        const float four[4] = {values[v], values[v + 1], values[v + 2], values[v + 3]};
        store_chunk(p.partials + place + v, four, count - v, kVector);
      }
    }
  });
}

// One element per thread.
template <class T>
__device__ __forceinline__ void conv_reduce(const ConvReduceParams& p) {
  long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.count + p.bias_count) return;
  const bool of_bias = index >= p.count;
  if (of_bias) index -= p.count;
  const float* partials = of_bias ? p.bias_partials : p.partials;
  const long long count = of_bias ? p.bias_count : p.count;
  float sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) sum += partials[split * count + index];
  static_cast<T*>(of_bias ? p.dbias : p.dweight)[index] = from_float<T>(sum);
}

}  // namespace tdc
