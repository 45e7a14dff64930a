// The kernels of the convolution: X(name, Params, (function), threads, blocks per SM).
#pragma once

#include "cuda/conv/params.h"

// ROW(X, name, element type, tile, whole) for each variant of a pass. `whole` needs channel counts and addresses that
// are multiples of 16 bytes; the `any` variants serve the rest.
#define TDC_CONV_VARIANTS(ROW, X, pass)                        \
  ROW(X, pass##_bf16_128x128, tdc::bf16, tdc::Tile128, true)   \
  ROW(X, pass##_bf16_64x64, tdc::bf16, tdc::Tile64, true)      \
  ROW(X, pass##_bf16_64x64_any, tdc::bf16, tdc::Tile64, false) \
  ROW(X, pass##_fp16_128x128, tdc::half, tdc::Tile128, true)   \
  ROW(X, pass##_fp16_64x64, tdc::half, tdc::Tile64, true)      \
  ROW(X, pass##_fp16_64x64_any, tdc::half, tdc::Tile64, false) \
  ROW(X, pass##_tf32_128x128, float, tdc::Tile128, true)       \
  ROW(X, pass##_tf32_64x64, float, tdc::Tile64, true)          \
  ROW(X, pass##_tf32_64x64_any, float, tdc::Tile64, false)

#define TDC_CONV_TILED(X, name, Params, function, T, Tile) \
  X(name, Params, function, Tile::kThreads, tdc::conv_blocks_per_sm<Tile>(sizeof(T)))
#define TDC_CONV_FORWARD(X, name, T, Tile, whole) \
  TDC_CONV_TILED(X, name, tdc::ConvImageParams, (tdc::conv_images<T, Tile, tdc::ConvPass::kForward, whole>), T, Tile)
#define TDC_CONV_DGRAD(X, name, T, Tile, whole) \
  TDC_CONV_TILED(X, name, tdc::ConvImageParams, (tdc::conv_images<T, Tile, tdc::ConvPass::kDgrad, whole>), T, Tile)
#define TDC_CONV_WGRAD(X, name, T, Tile, whole) \
  TDC_CONV_TILED(X, name, tdc::ConvWgradParams, (tdc::conv_wgrad<T, Tile, whole>), T, Tile)

// The reduction over the splits of wgrad, and the sums that make dbias and dsample_bias.
#define TDC_CONV_SUMS(X, suffix, T)                                                                            \
  X(tdc_conv_reduce_##suffix, tdc::ConvReduceParams, (tdc::conv_reduce<T>), tdc::kConvSumThreads)              \
  X(tdc_conv_sample_sums_##suffix, tdc::ConvSampleSumParams, (tdc::conv_sample_sums<T>), tdc::kConvSumThreads) \
  X(tdc_conv_expert_sums_##suffix, tdc::ConvExpertSumParams, (tdc::conv_expert_sums<T>), tdc::kConvSumThreads)

#define TDC_KERNELS_conv_forward(X) TDC_CONV_VARIANTS(TDC_CONV_FORWARD, X, tdc_conv_forward)
#define TDC_CONV_MERGE(X, suffix, T) \
  X(tdc_conv_merge_taps_##suffix, tdc::ConvMergeParams, (tdc::conv_merge_taps<T>), tdc::kConvSumThreads)
#define TDC_KERNELS_conv_dgrad(X)                      \
  TDC_CONV_VARIANTS(TDC_CONV_DGRAD, X, tdc_conv_dgrad) \
  TDC_CONV_MERGE(X, bf16, tdc::bf16)                   \
  TDC_CONV_MERGE(X, fp16, tdc::half)
#define TDC_KERNELS_conv_wgrad(X)                      \
  TDC_CONV_VARIANTS(TDC_CONV_WGRAD, X, tdc_conv_wgrad) \
  TDC_CONV_SUMS(X, fp32, float)                        \
  TDC_CONV_SUMS(X, bf16, tdc::bf16)                    \
  TDC_CONV_SUMS(X, fp16, tdc::half)
