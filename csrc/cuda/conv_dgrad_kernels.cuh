// Instantiates the kernels of dgrad.
#pragma once

#include "cuda/conv_dgrad_kernels.h"
#include "cuda/conv_images.cuh"

#define TDC_CONV_DEFINE(unused, name, T, Tile, whole)                                                       \
  TDC_KERNEL_PER_SM(name, Tile::kThreads, tdc::conv_blocks_per_sm<Tile>(sizeof(T)), tdc::ConvImageParams) { \
    tdc::conv_images<T, Tile, tdc::ConvPass::kDgrad, whole>(p);                                             \
  }
TDC_CONV_VARIANTS(TDC_CONV_DEFINE, , tdc_conv_dgrad)
#undef TDC_CONV_DEFINE
