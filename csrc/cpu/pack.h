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

// Where the elements of a run of adjacent memory go: element j to packed row (j / period) * step + table[j % period].
// One tap's channels: period 1. Channels with num_taps adjacent taps each: period num_taps, in any order.
struct RunRows {
  const ptrdiff_t* table;
  int64_t period, step;
};

constexpr int kTableTaps = 49;  // larger filters take the general path

// The packed offsets of kLanes columns at a time repeat after `period` steps.
class RowWalker {
 public:
  RowWalker(const RunRows& rows, int64_t row) : step_(rows.step * row), period_(rows.period) {
    if (period_ == 1) {
      for (int i = 0; i < kLanes; ++i) table_[i] = i * step_;
      return;
    }
    ptrdiff_t* to = table_;
    for (int i = 0; i < kLanes; ++i)
      for (int64_t m = 0; m < period_; ++m) *to++ = i * step_ + rows.table[m] * row;
  }
  // Offsets of the next kLanes columns, relative to base().
  const ptrdiff_t* offsets() const { return table_ + at_ * kLanes; }
  ptrdiff_t base() const { return base_; }
  void advance() {
    if (period_ == 1) {
      base_ += kLanes * step_;
    } else if (++at_ == period_) {
      at_ = 0;
      base_ += kLanes * step_;
    }
  }
  void restart() { at_ = 0, base_ = 0; }

 private:
  ptrdiff_t step_, base_ = 0;
  int64_t period_, at_ = 0;
  ptrdiff_t table_[kTableTaps * kLanes];
};

template <typename T>
inline void load_square(const PanelPack& pack, const T* from, int columns, int lanes, Vec (&square)[kLanes]) {
  // Elements after the run are in the same tensor and are not kept, so only the end of the tensor needs care.
  const bool readable = static_cast<const T*>(pack.end) - (from + (lanes - 1) * pack.lane_stride) >= kLanes;
  if (readable && lanes == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = load(from + i * pack.lane_stride);
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    const T* row = from + i * pack.lane_stride;
    square[i] = i >= lanes ? Vec{} : readable ? load(row) : load_partial(row, columns);
  }
}

template <int Columns>
inline void store_square(float* to, const ptrdiff_t* offsets, const Vec (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < Columns; ++i) store(to + offsets[i], square[i]);
}

// Transposes a run of `length` adjacent elements of each of `lanes` strided rows into packed rows.
template <typename T>
inline void pack_run(const PanelPack& pack, const T* from, int64_t length, RowWalker& rows, float* to, int lanes) {
  constexpr int kFilter = 9;  // one 3x3 filter, the common run when channels are far apart
  for (int64_t j = 0; j < length; j += kLanes, rows.advance()) {
    const int columns = static_cast<int>(length - j < kLanes ? length - j : kLanes);
    Vec square[kLanes];
    load_square(pack, from + j, columns, lanes, square);
    float* base = to + rows.base();
    const ptrdiff_t* offsets = rows.offsets();
    if (columns == kLanes) {
      transpose(square);
      store_square<kLanes>(base, offsets, square);
    } else if (kFilter < kLanes && columns == kFilter) {
      transpose(square);
      store_square<(kFilter < kLanes ? kFilter : kLanes)>(base, offsets, square);
    } else if (columns == 1) {
      transpose(square);
      store_square<1>(base, offsets, square);
    } else {
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < columns) store(base + offsets[i], square[i]);
    }
  }
}

template <typename T>
inline void pack_lanes(const PanelPack& pack, int64_t lane, int lanes) {
  const T* from = static_cast<const T*>(pack.weights) + lane * pack.lane_stride;
  if (lanes <= 0) {
    for (int64_t t = 0; t < pack.num_taps; ++t)
      for (int64_t d = 0; d < pack.depth; ++d) store(pack.packed + (t * pack.tap_rows + d) * pack.row + lane, Vec{});
  } else if (pack.lane_stride == 1) {
    for (int64_t t = 0; t < pack.num_taps; ++t)
      for (int64_t d = 0; d < pack.depth; ++d)
        store(pack.packed + (t * pack.tap_rows + d) * pack.row + lane,
              load_upto(from + pack.taps[t] + d * pack.depth_stride, lanes));
  } else if (pack.depth_stride == 1) {
    RowWalker rows({nullptr, 1, 1}, pack.row);
    for (int64_t t = 0; t < pack.num_taps; ++t, rows.restart())
      pack_run(pack, from + pack.taps[t], pack.depth, rows, pack.packed + t * pack.tap_rows * pack.row + lane, lanes);
  } else if (pack.tap_at && pack.num_taps <= kTableTaps) {
    ptrdiff_t table[kTableTaps];
    for (int64_t m = 0; m < pack.num_taps; ++m) table[m] = pack.tap_at[m] * pack.tap_rows;
    RowWalker rows({table, pack.num_taps, 1}, pack.row);
    if (pack.depth_stride == pack.num_taps) {
      pack_run(pack, from, pack.depth * pack.num_taps, rows, pack.packed + lane, lanes);
    } else {
      for (int64_t d = 0; d < pack.depth; ++d, rows.restart())
        pack_run(pack, from + d * pack.depth_stride, pack.num_taps, rows, pack.packed + d * pack.row + lane, lanes);
    }
  } else {
    for (int64_t t = 0; t < pack.num_taps; ++t)
      for (int64_t d = 0; d < pack.depth; ++d)
        for (int i = 0; i < kLanes; ++i)
          pack.packed[(t * pack.tap_rows + d) * pack.row + lane + i] =
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
template <typename T>
inline void unpack_run(const PanelUnpack& unpack, const float* from, int64_t length, RowWalker& rows, T* to,
                       int lanes) {
  for (int64_t j = 0; j < length; j += kLanes, rows.advance()) {
    const int columns = static_cast<int>(length - j < kLanes ? length - j : kLanes);
    const float* base = from + rows.base();
    const ptrdiff_t* offsets = rows.offsets();
    Vec square[kLanes];
    if (columns == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(base + offsets[i]);
    } else {
      for (int i = 0; i < kLanes; ++i) square[i] = i < columns ? load(base + offsets[i]) : Vec{};
    }
    transpose(square);
    if (columns == kLanes && lanes == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + i * unpack.lane_stride + j, square[i]);
    } else {
      for (int i = 0; i < lanes; ++i) store_upto(to + i * unpack.lane_stride + j, square[i], columns);
    }
  }
}

template <typename T>
inline void unpack_lanes(const PanelUnpack& unpack, int64_t lane, int lanes) {
  T* to = static_cast<T*>(unpack.weights) + lane * unpack.lane_stride;
  const float* from = unpack.sums + lane;
  if (unpack.depth_stride == 1) {
    RowWalker rows({nullptr, 1, 1}, unpack.row);
    for (int64_t t = 0; t < unpack.num_taps; ++t, rows.restart())
      unpack_run(unpack, from + t * unpack.depth * unpack.row, unpack.depth, rows, to + unpack.taps[t], lanes);
  } else if (unpack.taps_dense && unpack.depth_stride == unpack.num_taps && unpack.num_taps <= kTableTaps) {
    ptrdiff_t table[kTableTaps];
    for (int64_t t = 0; t < unpack.num_taps; ++t) table[t] = t * unpack.depth;
    RowWalker rows({table, unpack.num_taps, 1}, unpack.row);
    unpack_run(unpack, from, unpack.depth * unpack.num_taps, rows, to, lanes);
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
