// Register tiles of the convolution: P pixels by V vectors of output channels, sums held in registers throughout.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/simd.h"

namespace tdc {
namespace TDC_FAST_ISA {
namespace {  // internal linkage: code built for one set must never be linked into another

// P * kPanelVectors sums, a broadcast and the weights fill the vector registers; P pointers fit the general ones.
#if defined(TDC_FAST_ISA_avx512) || defined(__aarch64__)
constexpr int kPixels = 8;
#else
constexpr int kPixels = 6;
#endif

// Keeps compilers from folding a load into each multiplication, which makes small tiles wait for loads.
inline __attribute__((always_inline)) void keep_in_register([[maybe_unused]] Vec& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// sums[p] += x(p) * (weights(0), .., weights(V - 1)), where weights(v) is where vector v is.
template <int P, int V, typename Weights, typename Source>
inline __attribute__((always_inline)) void accumulate(Vec (&sums)[P][V], Weights weights, Source x) {
  Vec w[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    w[v] = load(weights(v));
    keep_in_register(w[v]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const float scalar = x(p);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[p][v] += w[v] * scalar;
  }
}

inline auto vectors_from(const float* first) {
  return [first](int v) { return first + v * kLanes; };
}

// Brings the lines that a tile will write, and its residual, into L1 while the tile multiplies.
template <typename T, int V>
inline void fetch_output(const PanelTile& tile, const ConvPixel& pixel) {
#pragma GCC unroll 4
  for (size_t byte = 0; byte < V * kLanes * sizeof(T); byte += 64) {
    const size_t at = static_cast<size_t>(tile.channel) * sizeof(T) + byte;
    __builtin_prefetch(static_cast<const char*>(pixel.out) + at, 1);
    if (pixel.residual) __builtin_prefetch(static_cast<const char*>(pixel.residual) + at, 0);
  }
}

// The last panel of a pixel: residual, rounding, and zeros past the live width.
template <typename T, int V>
inline void finish_partial(const PanelTile& tile, const ConvPixel& pixel, const Vec (&sums)[V]) {
  T* out = static_cast<T*>(pixel.out);
  const T* residual = static_cast<const T*>(pixel.residual);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t channel = tile.channel + v * kLanes;
    const int count = static_cast<int>(tile.live - channel < kLanes ? tile.live - channel : kLanes);
    if (count <= 0) break;
    Vec sum = sums[v];
    if (residual) sum += load_upto(residual + channel, count);
    store_upto(out + channel, sum, count);
  }
}

// Zeros past the live width; in whole vectors, as a pixel has too few bytes for a call of memset to pay.
template <typename T>
inline void zero_tail(const PanelTile& tile, void* pixel) {
  T* out = static_cast<T*>(pixel);
  int64_t channel = tile.live;
  for (; channel + kLanes <= tile.channels; channel += kLanes) store(out + channel, Vec{});
  if (channel < tile.channels) store_upto(out + channel, Vec{}, static_cast<int>(tile.channels - channel));
}

// Adds bias and residual and writes a pixel.
template <typename T, int V>
inline __attribute__((always_inline)) void finish(const PanelTile& tile, const ConvPixel& pixel, Vec (&sums)[V]) {
  // The bias is added last: a sum that started from it would round every product to its magnitude.
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sums[v] += load(pixel.init + tile.channel + v * kLanes);
  if (tile.channel + V * kLanes > tile.live) return finish_partial<T, V>(tile, pixel, sums);
  T* out = static_cast<T*>(pixel.out) + tile.channel;
  if (pixel.residual) {
    const T* residual = static_cast<const T*>(pixel.residual) + tile.channel;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] += load(residual + v * kLanes);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(out + v * kLanes, sums[v]);
}

// Rounding errors grow with the length of a sum, so runs of about this many products are summed separately.
constexpr ptrdiff_t kRun = 128;

// chains[0] += chains[1] + ..
template <int C, int P, int V>
inline void add_chains(Vec (&chains)[C][P][V]) {
#pragma GCC unroll 4
  for (int c = 1; c < C; ++c)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) chains[0][p][v] += chains[c][p][v];
}

// A multiply-add takes about four cycles and two can start in each, so few pixels need several chains of sums: chain c
// sums the products of depths c, c + kC, .. of every tap. The number of chains must not depend on P, the pixels that
// happen to share a tile: it decides the order of a pixel's sums.
template <typename T, int P, int V, int kC>
void gather_tile(const GatherTile& tile) {
  Vec chains[kC][P][V] = {};
  Vec(&sums)[P][V] = chains[0];

  const float* source[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    source[p] = tile.pixels[p].source;
    fetch_output<T, V>(tile, tile.pixels[p]);
  }
  const ptrdiff_t row = tile.row;
  // Sums of finished runs are kept in memory: the registers hold the current run.
  alignas(64) float memory[P * V * kLanes];
  float* totals = memory;
  asm("" : "+r"(totals) : : "memory");
  const bool in_runs = tile.num_taps * tile.depth > kRun;
  ptrdiff_t left = in_runs ? kRun : PTRDIFF_MAX;
  if (in_runs) std::memset(totals, 0, sizeof(memory));
  for (const GatherTap *tap = tile.taps, *last = tap + tile.num_taps; tap != last; ++tap) {
    const float* weights = tile.weights + tap->weight * row;
    ptrdiff_t at = tap->source;
    const ptrdiff_t end = at + tile.depth;
    if constexpr (kC > 1) {
      for (; end - at >= kC; at += kC) {
        asm("" : "+r"(at));
#pragma GCC unroll 4
        for (int c = 0; c < kC; ++c, weights += row)
          accumulate<P, V>(chains[c], vectors_from(weights), [&](int p) { return source[p][at + c]; });
      }
    }
    for (; at != end; ++at) {
      // One opaque index for all pixels: otherwise compilers keep a pointer per pixel and spill them at every tap.
      asm("" : "+r"(at));
      accumulate<P, V>(sums, vectors_from(weights), [&](int p) { return source[p][at]; });
      weights += row;
    }
    if ((left -= tile.depth) <= 0) {
      left = kRun;
      add_chains(chains);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          float* total = totals + (p * V + v) * kLanes;
          store(total, load(total) + sums[p][v]);
#pragma GCC unroll 4
          for (int c = 0; c < kC; ++c) chains[c][p][v] = Vec{};
        }
    }
  }
  add_chains(chains);
  if (in_runs) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[p][v] += load(totals + (p * V + v) * kLanes);
  }

#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) finish<T, V>(tile, tile.pixels[p], sums[p]);
  if (tile.last && tile.channels > tile.live)
    for (int p = 0; p < P; ++p) zero_tail<T>(tile, tile.pixels[p].out);
}

// sums[p] += x(p - 1) * w[0] + x(p) * w[1] + x(p + 1) * w[2], for one channel of the source. x(-1) and x(P) exist only
// if Left and Right.
template <int P, int V, bool Left, bool Right, typename Source>
inline __attribute__((always_inline)) void accumulate_row(Vec (&sums)[P][V], const float* const (&weights)[3],
                                                          ptrdiff_t at, Source x) {
  Vec w[3][V];
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      w[s][v] = load(weights[s] + at + v * kLanes);
      keep_in_register(w[s][v]);
    }
#pragma GCC unroll 10
  for (int q = Left ? -1 : 0; q < P + (Right ? 1 : 0); ++q) {
    Vec value = x(q) - Vec{};  // in all lanes
    keep_in_register(value);
#pragma GCC unroll 3
    for (int s = 2; s >= 0; --s)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        if (const int p = q + 1 - s; p >= 0 && p < P) sums[p][v] += w[s][v] * value;
  }
}

// Where pixel p of adjacent ones is written, and its residual.
template <typename T>
inline ConvPixel pixel_of(const PanelTile& tile, ConvPixel first, int p) {
  first.out = static_cast<T*>(first.out) + p * tile.channels;
  if (first.residual) first.residual = static_cast<const T*>(first.residual) + p * tile.channels;
  return first;
}

template <typename T, int V, bool Left, bool Right>
void row_tile(const RowTile& tile) {
  constexpr int P = kRowPixels;
  // With one vector, each pixel has two chains of sums (even and odd channels): 8 sums, each used three times in a row,
  // would wait for one another.
  constexpr int kC = V == 1 ? 2 : 1;
  const auto pixel = [&](int p) { return pixel_of<T>(tile, tile.first, p); };
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) fetch_output<T, V>(tile, pixel(p));

  // As in a gather tile, but a run may end within a row of taps. Only the sums of one run are in registers: with more,
  // compilers keep some of them in memory.
  alignas(64) float memory[P * V * kLanes];
  float* totals = memory;
  asm("" : "+r"(totals) : : "memory");
  const ptrdiff_t row = tile.row, step = tile.step, parts = tile.depth * 3 / kRun + 1;
  const bool in_runs = tile.num_taps * tile.depth * 3 > kRun + kRun / 2;
  const RowTap *tap = tile.taps, *last = tap + tile.num_taps;
  ptrdiff_t part = 0, begin = 0;
  bool first = true;
  do {
    Vec chains[kC][P][V] = {};
    Vec(&sums)[P][V] = chains[0];
    for (ptrdiff_t left = in_runs ? kRun : PTRDIFF_MAX; tap != last && left > 0;) {
      const float* weights[3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) weights[s] = tile.weights + tap->weights[s] * row;
      // Few pointers serve all pixels: an address has room for another pixel or two.
      const float* source[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) source[i] = tile.first.source + tap->source + (3 * i - 1) * step;
      const ptrdiff_t end = tile.depth * (part + 1) / parts;
      const auto add = [&](Vec(&to)[P][V], ptrdiff_t c) __attribute__((always_inline)) {
        accumulate_row<P, V, Left, Right>(to, weights, c * row,
                                          [&](int q) { return source[(q + 1) / 3][(q + 1) % 3 * step + c]; });
      };
      ptrdiff_t c = begin;
      for (; end - c >= kC; c += kC)
#pragma GCC unroll 2
        for (int k = 0; k < kC; ++k) add(chains[k], c + k);
      if constexpr (kC > 1)
        if (c != end) add(sums, c);
      left -= (end - begin) * 3;
      begin = end;
      if (++part == parts) part = begin = 0, ++tap;
    }
    add_chains(chains);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* total = totals + (p * V + v) * kLanes;
        store(total, first ? sums[p][v] : load(total) + sums[p][v]);
      }
    first = false;
  } while (tap != last);

#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    Vec sums[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] = load(totals + (p * V + v) * kLanes);
    finish<T, V>(tile, pixel(p), sums);
  }
  if (tile.last && tile.channels > tile.live)
    for (int p = 0; p < P; ++p) zero_tail<T>(tile, pixel(p).out);
}

// Adjacent pixels by the vectors of two panels. The output is not fetched beforehand: the lines of so short a sum would
// arrive after the sum is done, and hold up those of the source.
template <typename T, int P>
void flat_tile(const FlatTile& tile) {
  constexpr int V = 2 * kPanelVectors;
  const float* source[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) source[i] = tile.first.source + 3 * i * tile.step;
  const float* weights[2] = {tile.weights, tile.next_weights};
  Vec sums[P][V] = {};
  for (ptrdiff_t at = 0; at != tile.depth; ++at) {
    accumulate<P, V>(
        sums, [&](int v) { return weights[v / kPanelVectors] + v % kPanelVectors * kLanes; },
        [&](int p) { return source[p / 3][p % 3 * tile.step + at]; });
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) weights[i] += tile.row;
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) finish<T, V>(tile, pixel_of<T>(tile, tile.first, p), sums[p]);
  if (tile.last && tile.channels > tile.live)
    for (int p = 0; p < P; ++p) zero_tail<T>(tile, pixel_of<T>(tile, tile.first, p).out);
}

template <int P, int V>
void outer_tile(const OuterTile& tile) {
  // A chunk is summed from zero and added as a whole, so that rounding errors grow with its length, not the batch's.
  Vec sums[P][V] = {};
  for (const PixelPair *pixel = tile.pixels, *end = pixel + tile.num_pixels; pixel != end; ++pixel) {
    const float* source = tile.source + pixel->x;
    accumulate<P, V>(sums, vectors_from(tile.dy + pixel->dy), [&](int p) { return source[p]; });
  }

#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* total = tile.sums + p * tile.row + v * kLanes;
      store(total, load(total) + sums[p][v]);
    }
}

}  // namespace
}  // namespace TDC_FAST_ISA
}  // namespace tdc
