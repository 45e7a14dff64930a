// Forward and dgrad: the convolutions whose result is a batch of images.
//
//   rows of the tile     pixels of the result, of up to NB samples of one group (a row of the tile table)
//   columns              its channels
//   depth                for every tap the live channels of the source, kConvDepth at a time
//
// Forward gathers y[i] from x[i * stride - pad + r]. dgrad gathers dx[i] from dy[(i + pad - r) / stride] where the
// division is exact: pixels of one parity need the same taps, so each parity is computed as a smaller image with every
// stride-th tap, and no product is wasted. In both, row i of the image reads source row i * step + first + t *
// direction at its t-th tap.
//
// Two inputs: forward walks at every tap the channels of x, then those of x2; in dgrad a block computes channels of one
// of them. An upsampled image: forward reads x at half of row and column. In dgrad, a pixel of x gets the gradients of
// its 2 x 2 pixels, so along each axis every tap counts twice: its t-th is the filter's tap t / 2, for pixel t % 2.
#pragma once

#include "cuda/device.cuh"
#include "cuda/conv/epilogue.cuh"
#include "cuda/conv/pipeline.cuh"
#include "cuda/conv/routing.cuh"

namespace tdc {

enum class ConvPass { kForward, kDgrad };

// One dimension of the image that a block computes.
struct ConvAxis {
  int size;                    // pixels
  int result, result_step;     // pixel i is the result's pixel result + i * result_step
  int first, step, direction;  // see above
  int tap, tap_step, taps;     // the t-th tap is the filter's tap + t * tap_step

  __device__ __forceinline__ static ConvAxis forward(int out_size, int filter, int stride, int pad) {
    return {out_size, 0, 1, -pad, stride, 1, 0, 1, filter};
  }
  // The pixels parity, parity + stride, ... of x, which is upsampled with stride 1 alone.
  __device__ __forceinline__ static ConvAxis dgrad(int in_size, int filter, int stride, int pad, int parity,
                                                   int upsample_log2) {
    const int tap = (parity + pad) % stride, taps = tap < filter ? (filter - tap + stride - 1) / stride : 0;
    return {(in_size - parity + stride - 1) / stride,
            parity,
            stride,
            (parity + pad - tap) / stride,
            1 << upsample_log2,
            -1,
            tap,
            stride,
            taps << upsample_log2};
  }
};

// What one block computes.
struct ConvImageTile {
  ConvAxis rows, columns;  // of the image
  int first_sample, num_samples;
  int first_pixel;                 // of all pixels of the samples, of the tile's first row
  int first_channel, end_channel;  // of the result, of the tile's first column; of the tensor that holds it
  int expert, live_source, live_result;

  __device__ __forceinline__ bool row_exists(int row) const {
    return first_pixel + row < num_samples * rows.size * columns.size;
  }

  // The sample of a row of the tile, counted through the batch.
  __device__ __forceinline__ int sample(int row) const {
    return num_samples == 1 ? first_sample : first_sample + (first_pixel + row) / (rows.size * columns.size);
  }

  // The pixel of a row of the tile in a result of height x width, counted through the batch.
  __device__ __forceinline__ int result_pixel(int row, int height, int width) const {
    const int index = first_pixel + row, per_row = columns.size, per_sample = rows.size * per_row;
    if (rows.result_step == 1 && columns.result_step == 1) return first_sample * per_sample + index;
    const int y = rows.result + index % per_sample / per_row * rows.result_step;
    const int x = columns.result + index % per_row * columns.result_step;
    return (sample(row) * height + y) * width + x;
  }
};

// Returns false when the block has nothing to do.
template <class Tile, ConvPass kPass>
__device__ __forceinline__ bool find_tile(const ConvImageParams& p, ConvImageTile& tile) {
  const ConvGeometry& g = p.geometry;
  // Blocks of one row of the table are neighbours, so that its samples are in the L2 cache.
  unsigned block = blockIdx.x;
  tile.first_channel = block % p.channel_tiles * Tile::kColumns;
  tile.end_channel = kPass == ConvPass::kForward ? g.out_channels : g.x_channels;
  if (kPass == ConvPass::kDgrad && tile.first_channel >= g.x_channels) {
    const int tiles_of_x = (g.x_channels + Tile::kColumns - 1) / Tile::kColumns;
    tile.first_channel += g.x_channels - tiles_of_x * Tile::kColumns;
    tile.end_channel = g.in_channels;
  }
  block /= p.channel_tiles;
  if (kPass == ConvPass::kForward) {
    tile.rows = ConvAxis::forward(g.out_height, g.filter_height, g.stride_height, g.pad_height);
    tile.columns = ConvAxis::forward(g.out_width, g.filter_width, g.stride_width, g.pad_width);
  } else {
    const int across = block % g.stride_width, down = block / g.stride_width % g.stride_height;
    block /= g.stride_width * g.stride_height;
    tile.rows = ConvAxis::dgrad(g.height, g.filter_height, g.stride_height, g.pad_height, down, g.upsample_log2);
    tile.columns = ConvAxis::dgrad(g.width, g.filter_width, g.stride_width, g.pad_width, across, g.upsample_log2);
  }
  tile.first_pixel = block % p.pixel_tiles * Tile::kRows;
  const int* entry = p.tiles + 3LL * (block / p.pixel_tiles);
  const int group = entry[0];
  if (group < 0 || group >= p.routing.num_groups) return false;
  tile.first_sample = clamp_to(entry[1], p.routing.batch);
  tile.num_samples = clamp_to(entry[2], p.routing.batch - tile.first_sample);
  tile.expert = expert_of_group(p.routing, group);
  const int live_in = live_width(p.routing.in_widths, group, g.in_channels);
  const int live_out = live_width(p.routing.out_widths, group, g.out_channels);
  tile.live_source = kPass == ConvPass::kForward ? live_in : live_out;
  tile.live_result = min(kPass == ConvPass::kForward ? live_out : live_in, tile.end_channel);
  return tile.row_exists(0);
}

// Copies pixels of the source and weights into a stage, step after step: taps in the outer loop, channels in the inner
// one. A step has channels of one input.
template <class P, ConvPass kPass, bool kVector>
class ConvImageLoader {
  using T = typename P::Element;
  using Pixels = typename P::ShareA;
  using Weights = typename P::ShareB;
  static constexpr bool kForward = kPass == ConvPass::kForward;

 public:
  __device__ __forceinline__ ConvImageLoader(const ConvImageParams& p, const ConvImageTile& tile)
      : p_(p), tile_(tile), source_(static_cast<const T*>(p.source)), weight_(static_cast<const T*>(p.weight)) {
    const ConvGeometry& g = p.geometry;
    height_ = kForward ? g.height : g.out_height;
    width_ = kForward ? g.width : g.out_width;
    filter_width_ = g.filter_width;
    weight_channels_ = g.in_channels;
    taps_ = g.filter_height * g.filter_width;
    weight_ += static_cast<long long>(tile.expert) * g.out_channels * taps_ * g.in_channels;
    end_ = first_end();
    find_pixels();
    find_weights();
    enter_tap();
  }

  __device__ __forceinline__ int steps() const {
    const int live = tile_.first_channel < tile_.live_result ? tile_.live_source : 0;
    const int of_first = min(live, first_end()), of_second = live - of_first;
    return tile_.rows.taps * tile_.columns.taps *
           ((of_first + kConvDepth - 1) / kConvDepth + (of_second + kConvDepth - 1) / kConvDepth);
  }

  __device__ __forceinline__ void load(unsigned char* stage) {
    load_pixels(stage);
    load_weights(stage + P::A::kBytes);
    channel_ += kConvDepth;
    if (channel_ < end_) return;
    if (kForward && end_ < tile_.live_source) {
      channel_ = end_;
      end_ = tile_.live_source;
    } else {
      channel_ = 0;
      end_ = first_end();
      if (++tap_column_ == tile_.columns.taps) {
        tap_column_ = 0;
        ++tap_row_;
      }
    }
    enter_tap();
  }

 private:
  static constexpr int kOutside = -(1 << 30);

  // Live channels of the first input.
  __device__ __forceinline__ int first_end() const {
    return kForward ? min(tile_.live_source, p_.geometry.x_channels) : tile_.live_source;
  }

  // Where the lines of the pixel operand begin in the source, at the first tap.
  __device__ __forceinline__ void find_pixels() {
#pragma unroll
    for (int i = 0; i < Pixels::kCopies; ++i) {
      const int row = Pixels::line(i), index = tile_.first_pixel + row, per_row = tile_.columns.size;
      const int per_sample = tile_.rows.size * per_row, sample = index / per_sample;
      top_[i] = index % per_sample / per_row * tile_.rows.step + tile_.rows.first;
      left_[i] = index % per_row * tile_.columns.step + tile_.columns.first;
      first_[i] = (tile_.first_sample + sample) * height_ * width_;
      if (!tile_.row_exists(row)) top_[i] = kOutside;
    }
  }

  // The same for the weights: lines are channels of the result in forward, of the source in dgrad.
  __device__ __forceinline__ void find_weights() {
    const int chunk = Weights::chunk() * kPerChunk<T>;
#pragma unroll
    for (int i = 0; i < Weights::kCopies; ++i) {
      const int line = Weights::line(i);
      const int out = kPass == ConvPass::kForward ? tile_.first_channel + line : line;
      const int in = kPass == ConvPass::kForward ? chunk : tile_.first_channel + chunk;
      lines_[i] = weight_ + (static_cast<long long>(out) * taps_ * weight_channels_ + in);
    }
  }

  // A tap reads the same pixels for all its channels of an input.
  __device__ __forceinline__ void enter_tap() {
    const ConvGeometry& g = p_.geometry;
    // Of upsampled images: forward halves rows and columns, dgrad takes every tap for two pixels, see above.
    const int halved = kForward ? g.upsample_log2 : 0, paired = kForward ? 0 : g.upsample_log2;
    const int row_tap = tap_row_ >> paired, column_tap = tap_column_ >> paired;
    const int pixels_of_pair = TDC_PLANTED(CONV_ONE_PIXEL_OF_FOUR) ? 0 : paired;
    const int down =
        (row_tap + (TDC_PLANTED(CONV_WRONG_TAP) ? 1 : 0)) * tile_.rows.direction + (tap_row_ & pixels_of_pair);
    const int across = column_tap * tile_.columns.direction + (tap_column_ & pixels_of_pair);
    const bool second = kForward && channel_ > 0;
    const T* source = second ? static_cast<const T*>(p_.source2) - g.x_channels : source_;
    const int channels = !kForward ? g.out_channels : second ? g.in_channels - g.x_channels : g.x_channels;
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < Pixels::kCopies; ++i) {
      const int row = top_[i] + down, column = left_[i] + across;
      const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(height_ << halved) &&
                          static_cast<unsigned>(column) < static_cast<unsigned>(width_ << halved);
      const int pixel = inside ? first_[i] + (row >> halved) * width_ + (column >> halved) : 0;
      pixels_[i] = source + (static_cast<long long>(pixel) * channels + Pixels::chunk() * kPerChunk<T>);
      inside_ |= inside ? 1u << i : 0u;
    }
    tap_ = (tile_.rows.tap + row_tap * tile_.rows.tap_step) * filter_width_ + tile_.columns.tap +
           column_tap * tile_.columns.tap_step;
  }

  __device__ __forceinline__ void load_pixels(unsigned char* shared) {
    const T* from[Pixels::kCopies];
#pragma unroll
    for (int i = 0; i < Pixels::kCopies; ++i) from[i] = pixels_[i] + channel_;
    const int left = end_ - channel_ - Pixels::chunk() * kPerChunk<T>;
    const int live = TDC_PLANTED(CONV_KEEPS_DEAD) && left > 0 ? kPerChunk<T> : left;
    copy_share<Pixels, kVector>(shared, source_, from, inside_, live);
  }

  __device__ __forceinline__ void load_weights(unsigned char* shared) {
    const int chunk = Weights::chunk() * kPerChunk<T>;
    const long long step = kForward ? static_cast<long long>(tap_) * weight_channels_ + channel_
                                    : (static_cast<long long>(channel_) * taps_ + tap_) * weight_channels_;
    const int live = kForward ? end_ - channel_ - chunk : tile_.live_result - tile_.first_channel - chunk;
    const int lines = kForward ? tile_.live_result - tile_.first_channel : tile_.live_source - channel_;
    const T* from[Weights::kCopies];
    unsigned exists = 0;
#pragma unroll
    for (int i = 0; i < Weights::kCopies; ++i) {
      from[i] = lines_[i] + step;
      exists |= Weights::line(i) < lines ? 1u << i : 0u;
    }
    copy_share<Weights, kVector>(shared, weight_, from, exists,
                                 TDC_PLANTED(CONV_KEEPS_DEAD_WEIGHTS) && live > 0 ? kPerChunk<T> : live);
  }

  const ConvImageParams& p_;
  const ConvImageTile& tile_;
  const T* source_;
  const T* weight_;     // of the expert
  int height_, width_;  // of the source
  int filter_width_, weight_channels_, taps_;
  int first_[Pixels::kCopies];                        // per line the first pixel of its sample
  int top_[Pixels::kCopies], left_[Pixels::kCopies];  // and the pixel that its first tap reads
  const T* lines_[Weights::kCopies];
  // The next step:
  int tap_row_ = 0, tap_column_ = 0, channel_ = 0;
  int end_;                           // of the live channels of the input that channel_ belongs to
  int tap_;                           // of the filter
  const T* pixels_[Pixels::kCopies];  // the pixels that it reads
  unsigned inside_;                   // bit i: pixels_[i] lies in the image
};

template <class T, class Tile, ConvPass kPass>
struct ConvImageProduct : ConvProduct<T, Tile, DepthInner, DepthInner> {};
template <class T, class Tile>
struct ConvImageProduct<T, Tile, ConvPass::kDgrad> : ConvProduct<T, Tile, DepthInner, DepthOuter> {};

// kVector: the channels of all sources are whole, aligned chunks of 16 bytes.
template <class T, class Tile, ConvPass kPass, bool kVector>
__device__ __forceinline__ void conv_images(const ConvImageParams& p) {
  using P = ConvImageProduct<T, Tile, kPass>;
  ConvImageTile tile;
  if (!find_tile<Tile, kPass>(p, tile)) return;

  TDC_DYNAMIC_SHARED(shared);
  typename P::Sums sums = {};
  {
    ConvImageLoader<P, kPass, kVector> loader(p, tile);
    const bool live = tile.row_exists(P::warp_row()) && tile.first_channel + P::warp_column() < tile.live_result;
    run_pipeline<P>(loader, loader.steps(), live, shared, sums);
  }

  const ConvGeometry& g = p.geometry;
  const bool forward = kPass == ConvPass::kForward;
  const int height = forward ? g.out_height : g.height, width = forward ? g.out_width : g.width;
  const bool second = !forward && tile.first_channel >= g.x_channels;
  const int origin = second ? g.x_channels : 0, channels = forward ? g.out_channels : tile.end_channel - origin;
  T* result = static_cast<T*>(second ? p.result2 : p.result) - origin;
  drain<P>(sums, shared, [&](int row, int column, float (&values)[kPerChunk<T>]) {
    const int channel = tile.first_channel + column, count = tile.end_channel - channel;
    if (!tile.row_exists(row) || count <= 0) return;
    const long long place = static_cast<long long>(tile.result_pixel(row, height, width)) * channels + channel;
    if (forward && p.bias) {
      const long long of_expert = static_cast<long long>(tile.expert) * channels + channel;
      add_chunk(values, static_cast<const T*>(p.bias) + of_expert, count, p.vector_result);
    }
    if (forward && p.sample_bias) {
      const long long of_sample = static_cast<long long>(tile.sample(row)) * channels + channel;
      add_chunk(values, static_cast<const T*>(p.sample_bias) + of_sample, count, p.vector_result);
    }
    if (forward && p.residual) add_chunk(values, static_cast<const T*>(p.residual) + place, count, p.vector_result);
#pragma unroll
    for (int v = 0; v < kPerChunk<T>; ++v) {
      if (channel + v >= tile.live_result && !TDC_PLANTED(CONV_STORES_DEAD)) values[v] = 0.0f;
    }
    store_chunk(result + place, values, count, p.vector_result);
  });
}

}  // namespace tdc
