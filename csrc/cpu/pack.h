// Data movement around the register tiles: weights into panels and back, activations to fp32, sums over pixels.
#pragma once

#include "cpu/conv_kernels.h"
#include "cpu/simd.h"

namespace tdc {
namespace TDC_FAST_ISA {
namespace {  // internal linkage: code built for one set must never be linked into another

template <typename T>
void copy_rows(const void* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t count,
               int64_t padded) {
  const T* source = static_cast<const T*>(from);
  for (int64_t r = 0; r < rows; ++r, source += from_stride, to += to_stride) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(source + i));
    for (; i < count; ++i) to[i] = to_float(source[i]);
    for (; i < padded; ++i) to[i] = 0.0f;
  }
}

template <typename T>
void sum_rows(const void* from, int64_t stride, int64_t rows, int64_t count, float* sums) {
  constexpr int kUnroll = 4;  // independent chains of additions
  const T* source = static_cast<const T*>(from);
  int64_t k = 0;
  for (; k + kLanes * kUnroll <= count; k += kLanes * kUnroll) {
    Vec sum[kUnroll] = {};
    for (int64_t r = 0; r < rows; ++r)
      for (int u = 0; u < kUnroll; ++u) sum[u] += load(source + r * stride + k + u * kLanes);
    for (int u = 0; u < kUnroll; ++u) store(sums + k + u * kLanes, sum[u]);
  }
  for (; k < count; k += kLanes) {
    const int live = static_cast<int>(count - k < kLanes ? count - k : kLanes);
    Vec sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load_upto(source + r * stride + k, live);
    store_upto(sums + k, sum, live);
  }
}

template <typename T>
void narrow_row(const float* from, void* to, int64_t count) {
  T* out = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int live = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    store_upto(out + i, load_upto(from + i, live), live);
  }
}

inline void add_row(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(to + i) + load(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

// Walks the packed rows of a run of memory that holds num_taps adjacent taps per channel: tap fastest.
struct TapMajorRun {
  const int32_t* tap_at;
  int64_t num_taps, depth, tap, d;
  int64_t next() {
    const int64_t row = tap_at[tap] * depth + d;
    if (++tap == num_taps) tap = 0, ++d;
    return row;
  }
};
// The same for a run of adjacent channels of one tap.
struct ChannelRun {
  int64_t row;
  int64_t next() { return row++; }
};

// Transposes a run of `length` adjacent elements of each of `lanes` strided rows into packed rows.
template <typename T, typename Rows>
inline void pack_run(const PanelPack& pack, const T* from, int64_t length, Rows rows, int64_t lane, int lanes) {
  const T* end = static_cast<const T*>(pack.end);
  for (int64_t j = 0; j < length; j += kLanes) {
    const int columns = static_cast<int>(length - j < kLanes ? length - j : kLanes);
    // Elements after the run belong to the same tensor and are not kept, so only its end needs care.
    const bool readable = end - (from + (lanes - 1) * pack.lane_stride + j) >= kLanes;
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < lanes) {
        const T* row = from + i * pack.lane_stride + j;
        block[i] = readable ? load(row) : load_partial(row, columns);
      } else {
        block[i] = Vec{};
      }
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (i < columns) store(pack.packed + rows.next() * pack.row + lane, block[i]);
  }
}

template <typename T>
inline void pack_lanes(const PanelPack& pack, int64_t lane, int lanes) {
  const T* from = static_cast<const T*>(pack.weights) + lane * pack.lane_stride;
  if (lanes <= 0) {
    for (int64_t r = 0; r < pack.num_taps * pack.depth; ++r) store(pack.packed + r * pack.row + lane, Vec{});
  } else if (pack.lane_stride == 1) {
    float* to = pack.packed + lane;
    for (int64_t t = 0; t < pack.num_taps; ++t)
      for (int64_t d = 0; d < pack.depth; ++d, to += pack.row)
        store(to, load_upto(from + pack.taps[t] + d * pack.depth_stride, lanes));
  } else if (pack.depth_stride == 1) {
    for (int64_t t = 0; t < pack.num_taps; ++t)
      pack_run(pack, from + pack.taps[t], pack.depth, ChannelRun{t * pack.depth}, lane, lanes);
  } else if (pack.tap_at && pack.depth_stride == pack.num_taps) {
    pack_run(pack, from, pack.depth * pack.num_taps,
             TapMajorRun{pack.tap_at, pack.num_taps, pack.depth, 0, 0}, lane, lanes);
  } else if (pack.tap_at) {
    for (int64_t d = 0; d < pack.depth; ++d)
      pack_run(pack, from + d * pack.depth_stride, pack.num_taps,
               TapMajorRun{pack.tap_at, pack.num_taps, pack.depth, 0, d}, lane, lanes);
  } else {
    for (int64_t t = 0; t < pack.num_taps; ++t)
      for (int64_t d = 0; d < pack.depth; ++d)
        for (int i = 0; i < kLanes; ++i)
          pack.packed[(t * pack.depth + d) * pack.row + lane + i] =
              i < lanes ? to_float(from[i * pack.lane_stride + d * pack.depth_stride + pack.taps[t]]) : 0.0f;
  }
}

template <typename T>
void pack_panel(const PanelPack& pack) {
  for (int64_t lane = 0; lane < pack.row; lane += kLanes) {
    const int64_t left = pack.lanes - lane;
    pack_lanes<T>(pack, lane, static_cast<int>(left < kLanes ? left : kLanes));
  }
}

// The reverse of pack_run: packed rows become a run of adjacent elements in each of `lanes` strided rows.
template <typename T, typename Rows>
inline void unpack_run(const PanelUnpack& unpack, T* to, int64_t length, Rows rows, int64_t lane, int lanes) {
  for (int64_t j = 0; j < length; j += kLanes) {
    const int columns = static_cast<int>(length - j < kLanes ? length - j : kLanes);
    Vec block[kLanes];
    if (columns == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(unpack.sums + rows.next() * unpack.row + lane);
    } else {
      for (int i = 0; i < kLanes; ++i)
        block[i] = i < columns ? load(unpack.sums + rows.next() * unpack.row + lane) : Vec{};
    }
    transpose(block);
    for (int i = 0; i < lanes; ++i) store_upto(to + i * unpack.lane_stride + j, block[i], columns);
  }
}

template <typename T>
inline void unpack_lanes(const PanelUnpack& unpack, int64_t lane, int lanes) {
  T* to = static_cast<T*>(unpack.weights) + lane * unpack.lane_stride;
  if (unpack.depth_stride == 1) {
    for (int64_t t = 0; t < unpack.num_taps; ++t)
      unpack_run(unpack, to + unpack.taps[t], unpack.depth, ChannelRun{t * unpack.depth}, lane, lanes);
  } else if (unpack.taps_dense && unpack.depth_stride == unpack.num_taps) {
    struct Run {
      int64_t num_taps, depth, tap, d;
      int64_t next() {
        const int64_t row = tap * depth + d;
        if (++tap == num_taps) tap = 0, ++d;
        return row;
      }
    };
    unpack_run(unpack, to, unpack.depth * unpack.num_taps, Run{unpack.num_taps, unpack.depth, 0, 0}, lane, lanes);
  } else {
    for (int64_t t = 0; t < unpack.num_taps; ++t)
      for (int64_t d = 0; d < unpack.depth; ++d)
        for (int i = 0; i < lanes; ++i) {
          const Vec value = {unpack.sums[(t * unpack.depth + d) * unpack.row + lane + i]};
          store_partial(to + i * unpack.lane_stride + d * unpack.depth_stride + unpack.taps[t], value, 1);
        }
  }
}

template <typename T>
void unpack_panel(const PanelUnpack& unpack) {
  for (int64_t lane = 0; lane < unpack.lanes; lane += kLanes) {
    const int64_t left = unpack.lanes - lane;
    unpack_lanes<T>(unpack, lane, static_cast<int>(left < kLanes ? left : kLanes));
  }
}

}  // namespace
}  // namespace TDC_FAST_ISA
}  // namespace tdc
