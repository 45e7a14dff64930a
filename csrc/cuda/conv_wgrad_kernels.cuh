// Instantiates the kernels of wgrad, of its reduction over splits, and of the channel sums.
#pragma once

#include "cuda/conv_channel_sums.cuh"
#include "cuda/conv_wgrad.cuh"
#include "cuda/conv_wgrad_kernels.h"

#define TDC_CONV_DEFINE(unused, name, T, Tile, whole)                                                       \
  TDC_KERNEL_PER_SM(name, Tile::kThreads, tdc::conv_blocks_per_sm<Tile>(sizeof(T)), tdc::ConvWgradParams) { \
    tdc::conv_wgrad<T, Tile, whole>(p);                                                                     \
  }
TDC_CONV_VARIANTS(TDC_CONV_DEFINE, , tdc_conv_wgrad)
#undef TDC_CONV_DEFINE

#define TDC_CONV_DEFINE(unused, suffix, T)                                                                      \
  TDC_KERNEL(tdc_conv_reduce_##suffix, tdc::kConvSumThreads, tdc::ConvReduceParams) { tdc::conv_reduce<T>(p); } \
  TDC_KERNEL(tdc_conv_sample_sums_##suffix, tdc::kConvSumThreads, tdc::ConvSampleSumParams) {                   \
    tdc::conv_sample_sums<T>(p);                                                                                \
  }                                                                                                             \
  TDC_KERNEL(tdc_conv_expert_sums_##suffix, tdc::kConvSumThreads, tdc::ConvExpertSumParams) {                   \
    tdc::conv_expert_sums<T>(p);                                                                                \
  }
TDC_CONV_SUM_TYPES(TDC_CONV_DEFINE, )
#undef TDC_CONV_DEFINE
