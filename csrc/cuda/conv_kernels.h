// The variants in which each pass of the convolution is compiled.
#pragma once

#include "cuda/conv_params.h"

// M(X, kernel, element type, tile, whole) for every variant: `whole` ones want all channels in whole, aligned 16 bytes,
// the `any` ones take the rest.
#define TDC_CONV_VARIANTS(M, X, pass)                        \
  M(X, pass##_bf16_128x128, tdc::bf16, tdc::Tile128, true)   \
  M(X, pass##_bf16_64x64, tdc::bf16, tdc::Tile64, true)      \
  M(X, pass##_bf16_64x64_any, tdc::bf16, tdc::Tile64, false) \
  M(X, pass##_fp16_128x128, tdc::half, tdc::Tile128, true)   \
  M(X, pass##_fp16_64x64, tdc::half, tdc::Tile64, true)      \
  M(X, pass##_fp16_64x64_any, tdc::half, tdc::Tile64, false) \
  M(X, pass##_tf32_128x128, float, tdc::Tile128, true)       \
  M(X, pass##_tf32_64x64, float, tdc::Tile64, true)          \
  M(X, pass##_tf32_64x64_any, float, tdc::Tile64, false)

#define TDC_CONV_IMAGE_ENTRY(X, name, T, Tile, whole) X(name, Tile::kThreads, tdc::ConvImageParams)
#define TDC_CONV_WGRAD_ENTRY(X, name, T, Tile, whole) X(name, Tile::kThreads, tdc::ConvWgradParams)
