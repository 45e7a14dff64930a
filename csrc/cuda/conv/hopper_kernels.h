// The kernels of the convolution's Hopper form: X(name, Params, (function), threads, blocks per SM).
#pragma once

#include "cuda/conv/hopper_params.h"
#include "cuda/conv/hopper_pointwise_params.h"
#include "cuda/conv/hopper_wgrad_params.h"

#define TDC_HOPPER_IMAGES(X, name, T, Tile, forward) \
  X(name, tdc::ConvHopperParams, (tdc::conv_hopper_images<T, Tile, forward>), tdc::kHopperThreads, 1)
#define TDC_HOPPER_TILES(X, name, T, forward)                                  \
  TDC_HOPPER_IMAGES(X, name##_16x16x128, T, tdc::HopperTile16x16, forward)     \
  TDC_HOPPER_IMAGES(X, name##_16x16x192, T, tdc::HopperTile16x16Wide, forward) \
  TDC_HOPPER_IMAGES(X, name##_32x16x64, T, tdc::HopperTile32x16, forward)      \
  TDC_HOPPER_IMAGES(X, name##_8x8x4x128, T, tdc::HopperTile8x8, forward)

#define TDC_KERNELS_conv_hopper_forward(X)                           \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_forward_bf16, tdc::bf16, true) \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_forward_fp16, tdc::half, true)
#define TDC_KERNELS_conv_hopper_dgrad(X)                            \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_dgrad_bf16, tdc::bf16, false) \
  TDC_HOPPER_TILES(X, tdc_conv_hopper_dgrad_fp16, tdc::half, false)

#define TDC_HOPPER_POINTWISE(X, name, T, rows, forward)  \
  X(name##_##rows##x128, tdc::ConvHopperPointwiseParams, \
    (tdc::conv_hopper_pointwise<T, tdc::HopperRows##rows, forward>), tdc::kHopperThreads, 1)
#define TDC_HOPPER_POINTWISE_TILES(X, name, T, forward) \
  TDC_HOPPER_POINTWISE(X, name, T, 256, forward)        \
  TDC_HOPPER_POINTWISE(X, name, T, 128, forward)

#define TDC_KERNELS_conv_hopper_pointwise(X)                                             \
  TDC_HOPPER_POINTWISE_TILES(X, tdc_conv_hopper_pointwise_forward_bf16, tdc::bf16, true) \
  TDC_HOPPER_POINTWISE_TILES(X, tdc_conv_hopper_pointwise_forward_fp16, tdc::half, true) \
  TDC_HOPPER_POINTWISE_TILES(X, tdc_conv_hopper_pointwise_dgrad_bf16, tdc::bf16, false)  \
  TDC_HOPPER_POINTWISE_TILES(X, tdc_conv_hopper_pointwise_dgrad_fp16, tdc::half, false)

#define TDC_HOPPER_WGRAD(X, suffix, T, Unit)                                                                     \
  X(tdc_conv_hopper_wgrad_##suffix, tdc::ConvHopperWgradParams, (tdc::conv_hopper_wgrad<T, Unit>),               \
    tdc::kHopperThreads, 1)                                                                                      \
  X(tdc_conv_hopper_wgrad_reduce_##suffix, tdc::ConvHopperWgradParams, (tdc::conv_hopper_wgrad_reduce<T, Unit>), \
    tdc::kHopperReduceThreads)
#define TDC_KERNELS_conv_hopper_wgrad(X)                      \
  TDC_HOPPER_WGRAD(X, bf16, tdc::bf16, tdc::HopperFilterUnit) \
  TDC_HOPPER_WGRAD(X, fp16, tdc::half, tdc::HopperFilterUnit)

#define TDC_HOPPER_POINTWISE_WGRAD(X, suffix, T)                        \
  TDC_HOPPER_WGRAD(X, 1x1x128_##suffix, T, tdc::HopperPointwiseUnit<1>) \
  TDC_HOPPER_WGRAD(X, 1x1x256_##suffix, T, tdc::HopperPointwiseUnit<2>) \
  TDC_HOPPER_WGRAD(X, 1x1x384_##suffix, T, tdc::HopperPointwiseUnit<3>)
#define TDC_KERNELS_conv_hopper_pointwise_wgrad(X) \
  TDC_HOPPER_POINTWISE_WGRAD(X, bf16, tdc::bf16)   \
  TDC_HOPPER_POINTWISE_WGRAD(X, fp16, tdc::half)
