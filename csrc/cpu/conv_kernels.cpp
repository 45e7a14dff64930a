#include "cpu/conv_kernels.h"

#include "cpu/conv_tiles.h"
#include "cpu/pack.h"

namespace tdc {
namespace TDC_FAST_ISA {
namespace {

using GatherFn = void (*)(const GatherTile&);
using OuterFn = void (*)(const OuterTile&);

template <typename T, int V, int Chains, int... P>
GatherFn choose_gather(int pixels, std::integer_sequence<int, P...>) {
  static constexpr GatherFn table[] = {gather_tile<T, P + 1, V, Chains>...};
  return table[pixels - 1];
}

template <int V, int... P>
OuterFn choose_outer(int rows, std::integer_sequence<int, P...>) {
  static constexpr OuterFn table[] = {outer_tile<P + 1, V>...};
  return table[rows - 1];
}

using TileSizes = std::make_integer_sequence<int, kPixels>;

using NarrowTileSizes = std::make_integer_sequence<int, kPixels / 2>;

// At least 8 sums are in flight in every full tile, and at most kPixels * 2 fill the registers.
template <typename T>
void gather(const GatherTile& tile) {
  static_assert(kPanelVectors == 2, "the numbers of chains below are for panels of 2 vectors");
  constexpr int kWide = kPixels >= 8 ? 1 : 2;
  const int pixels = tile.num_pixels;
  if (tile.narrow)
    (tile.vectors == 2 ? choose_gather<T, 2, 2>(pixels, NarrowTileSizes{})
                       : choose_gather<T, 1, 4>(pixels, NarrowTileSizes{}))(tile);
  else
    (tile.vectors == 2 ? choose_gather<T, 2, 1>(pixels, TileSizes{})
                       : choose_gather<T, 1, kWide>(pixels, TileSizes{}))(tile);
}

#if defined(TDC_FAST_ISA_avx512)
template <typename T>
void row(const RowTile& tile) {
  static constexpr void (*table[2][2][2])(const RowTile&) = {
      {{row_tile<T, 1, false, false>, row_tile<T, 1, false, true>},
       {row_tile<T, 1, true, false>, row_tile<T, 1, true, true>}},
      {{row_tile<T, 2, false, false>, row_tile<T, 2, false, true>},
       {row_tile<T, 2, true, false>, row_tile<T, 2, true, true>}},
  };
  table[tile.vectors - 1][tile.left][tile.right](tile);
}

template <typename T, int... P>
void flat(const FlatTile& tile, std::integer_sequence<int, P...>) {
  static constexpr void (*table[])(const FlatTile&) = {flat_tile<T, P + 1>...};
  table[tile.num_pixels - 1](tile);
}

template <typename T>
void flat(const FlatTile& tile) {
  flat<T>(tile, std::make_integer_sequence<int, kFlatPixels>{});
}
#endif

void outer(const OuterTile& tile) {
  (tile.vectors == 2 ? choose_outer<2>(tile.rows, TileSizes{}) : choose_outer<1>(tile.rows, TileSizes{}))(tile);
}

}  // namespace

const ConvKernels& conv_kernels() {
  static constexpr ConvKernels table = {
      kLanes,
      kPixels,
      {gather<float>, gather<Bf16>},
#if defined(TDC_FAST_ISA_avx512)
      {row<float>, row<Bf16>},
      {flat<float>, flat<Bf16>},
#else
      {nullptr, nullptr},
      {nullptr, nullptr},
#endif
      outer,
      {pack_panel<float>, pack_panel<Bf16>},
      {unpack_panel<float>, unpack_panel<Bf16>},
      {copy_rows<float>, copy_rows<Bf16>},
      {sum_rows<float>, sum_rows<Bf16>},
      {narrow_row<float>, narrow_row<Bf16>},
      add_row,
  };
  return table;
}

}  // namespace TDC_FAST_ISA
}  // namespace tdc
