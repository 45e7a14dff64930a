// Instantiates the kernels of the forward convolution.
#pragma once

#include "cuda/conv_forward_kernels.h"
#include "cuda/conv_images.cuh"

#define TDC_CONV_DEFINE(unused, name, T, Tile, whole)                                                       \
  TDC_KERNEL_PER_SM(name, Tile::kThreads, tdc::conv_blocks_per_sm<Tile>(sizeof(T)), tdc::ConvImageParams) { \
    tdc::conv_images<T, Tile, tdc::ConvPass::kForward, whole>(p);                                           \
  }
TDC_CONV_VARIANTS(TDC_CONV_DEFINE, , tdc_conv_forward)
#undef TDC_CONV_DEFINE
