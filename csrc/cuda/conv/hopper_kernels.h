// The kernels of the convolution's Hopper form: X(name, Params, (function), threads, blocks per SM[, blocks of a
// cluster]).
#pragma once

#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_rows_params.h"
#include "cuda/conv/hopper_strided_params.h"
#include "cuda/conv/hopper_wgrad_params.h"

#define TDC_HOPPER_IMAGES(X, name, T, Tile, forward) \
  X(name, tdc::ConvHopperParams, (tdc::conv_hopper_images<T, Tile, forward>), tdc::kHopperThreads, 1)
#define TDC_HOPPER_TILES(X, name, T, forward)                                  \
  TDC_HOPPER_IMAGES(X, name##_16x16x128, T, tdc::HopperTile16x16, forward)     \
  TDC_HOPPER_IMAGES(X, name##_16x16x192, T, tdc::HopperTile16x16Wide, forward) \
  TDC_HOPPER_IMAGES(X, name##_32x16x64, T, tdc::HopperTile32x16, forward)      \
  TDC_HOPPER_IMAGES(X, name##_8x8x4x128, T, tdc::HopperTile8x8, forward)       \
  TDC_HOPPER_IMAGES(X, name##_8x8x2x64, T, tdc::HopperTile8x8Quarter, forward) \
  TDC_HOPPER_IMAGES(X, name##_16x8x64, T, tdc::HopperTile16x8Quarter, forward)

#define TDC_KERNELS_conv_hopper_forward(X)                           \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_forward_bf16, tdc::bf16, true) \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_forward_fp16, tdc::half, true)
#define TDC_KERNELS_conv_hopper_dgrad(X)                            \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_dgrad_bf16, tdc::bf16, false) \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_dgrad_fp16, tdc::half, false)

#define TDC_HOPPER_ROWS(X, name, T, tile, forward, Params, Layout) \
  X(name##_##tile, Params, (tdc::conv_hopper_rows<T, Layout<tdc::HopperRows##tile, forward>>), tdc::kHopperThreads, 1)
#define TDC_HOPPER_ROWS_TILES(X, name, T, forward, Params, Layout) \
  TDC_HOPPER_ROWS(X, name, T, 256x128, forward, Params, Layout)    \
  TDC_HOPPER_ROWS(X, name, T, 128x128, forward, Params, Layout)    \
  TDC_HOPPER_ROWS(X, name, T, 128x64, forward, Params, Layout)
#define TDC_HOPPER_ROWS_PASSES(X, name, Params, Layout)                          \
  TDC_HOPPER_ROWS_TILES(X, name##_forward_bf16, tdc::bf16, true, Params, Layout) \
  TDC_HOPPER_ROWS_TILES(X, name##_forward_fp16, tdc::half, true, Params, Layout) \
  TDC_HOPPER_ROWS_TILES(X, name##_dgrad_bf16, tdc::bf16, false, Params, Layout)  \
  TDC_HOPPER_ROWS_TILES(X, name##_dgrad_fp16, tdc::half, false, Params, Layout)

// Clusters of `split` blocks.
#define TDC_HOPPER_SPLIT(X, name, T, split, tile, forward)                                            \
  X(name##_##tile, tdc::ConvHopperRowsParams,                                                         \
    (tdc::conv_hopper_rows<T, tdc::HopperRowsLayout<tdc::HopperRowsSplit##split##_##tile, forward>>), \
    tdc::kHopperThreads, 1, split)
#define TDC_HOPPER_SPLIT_TYPES(X, split, pass, forward)                                                     \
  TDC_HOPPER_SPLIT(X, tdc_conv_hopper_rows_split##split##_##pass##_bf16, tdc::bf16, split, 128x64, forward) \
  TDC_HOPPER_SPLIT(X, tdc_conv_hopper_rows_split##split##_##pass##_fp16, tdc::half, split, 128x64, forward)
#define TDC_KERNELS_conv_hopper_rows_split(X) \
  TDC_HOPPER_SPLIT_TYPES(X, 2, forward, true) \
  TDC_HOPPER_SPLIT_TYPES(X, 2, dgrad, false)  \
  TDC_HOPPER_SPLIT_TYPES(X, 4, forward, true) \
  TDC_HOPPER_SPLIT_TYPES(X, 4, dgrad, false)

#define TDC_KERNELS_conv_hopper_rows(X) \
  TDC_HOPPER_ROWS_PASSES(X, tdc_conv_hopper_rows, tdc::ConvHopperRowsParams, tdc::HopperRowsLayout)
#define TDC_HOPPER_MERGE(X, suffix, T) \
  X(tdc_conv_hopper_merge_taps_##suffix, tdc::ConvMergeParams, (tdc::conv_merge_taps<T>), tdc::kConvSumThreads)
#define TDC_KERNELS_conv_hopper_strided(X)                                                                   \
  TDC_HOPPER_ROWS_PASSES(X, tdc_conv_hopper_strided, tdc::ConvHopperStridedParams, tdc::HopperStridedLayout) \
  TDC_HOPPER_MERGE(X, bf16, tdc::bf16)                                                                       \
  TDC_HOPPER_MERGE(X, fp16, tdc::half)

#define TDC_HOPPER_WGRAD(X, suffix, T, Unit)                                                                     \
  X(tdc_conv_hopper_wgrad_##suffix, tdc::ConvHopperWgradParams, (tdc::conv_hopper_wgrad<T, Unit>),               \
    tdc::kHopperThreads, 1)                                                                                      \
  X(tdc_conv_hopper_wgrad_reduce_##suffix, tdc::ConvHopperWgradParams, (tdc::conv_hopper_wgrad_reduce<T, Unit>), \
    tdc::kHopperReduceThreads, tdc::kHopperReduceBlocks)
#define TDC_KERNELS_conv_hopper_wgrad(X)                      \
  TDC_HOPPER_WGRAD(X, bf16, tdc::bf16, tdc::HopperFilterUnit) \
  TDC_HOPPER_WGRAD(X, fp16, tdc::half, tdc::HopperFilterUnit)

#define TDC_HOPPER_ROWS_WGRAD(X, suffix, T)                        \
  TDC_HOPPER_WGRAD(X, rows128_##suffix, T, tdc::HopperRowsUnit<1>) \
  TDC_HOPPER_WGRAD(X, rows256_##suffix, T, tdc::HopperRowsUnit<2>) \
  TDC_HOPPER_WGRAD(X, rows384_##suffix, T, tdc::HopperRowsUnit<3>)
#define TDC_HOPPER_WINDOWS(X, suffix, T) \
  X(tdc_conv_hopper_window_sums_##suffix, tdc::ConvWindowSumParams, (tdc::conv_window_sums<T>), tdc::kWindowSumThreads)
#define TDC_KERNELS_conv_hopper_rows_wgrad(X) \
  TDC_HOPPER_ROWS_WGRAD(X, bf16, tdc::bf16)   \
  TDC_HOPPER_ROWS_WGRAD(X, fp16, tdc::half)   \
  TDC_HOPPER_WINDOWS(X, bf16, tdc::bf16)      \
  TDC_HOPPER_WINDOWS(X, fp16, tdc::half)
