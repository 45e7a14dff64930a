// The kernels for layers of few channels: X(name, Params, (function), threads, blocks per SM).
#pragma once

#include "cuda/conv/few_params.h"

#define TDC_CONV_FEW_IMAGES(X, name, function, suffix, T)                                               \
  X(tdc_conv_##name##_##suffix##_32, tdc::ConvFewImageParams, (tdc::function<T, tdc::kFewEntries>),     \
    tdc::kFewMostThreads, 2)                                                                            \
  X(tdc_conv_##name##_##suffix##_64, tdc::ConvFewImageParams, (tdc::function<T, tdc::kFewMostEntries>), \
    tdc::kFewMostThreads, 2)
#define TDC_KERNELS_conv_few_images(X)                                   \
  TDC_CONV_FEW_IMAGES(X, few_to_many, conv_few_to_many, bf16, tdc::bf16) \
  TDC_CONV_FEW_IMAGES(X, few_to_many, conv_few_to_many, fp16, tdc::half) \
  TDC_CONV_FEW_IMAGES(X, many_to_few, conv_many_to_few, bf16, tdc::bf16) \
  TDC_CONV_FEW_IMAGES(X, many_to_few, conv_many_to_few, fp16, tdc::half)

#define TDC_CONV_FEW_WGRAD(X, suffix, T)                                                                       \
  X(tdc_conv_few_wgrad_##suffix##_32, tdc::ConvFewWgradParams, (tdc::conv_few_wgrad<T, tdc::kFewEntries>),     \
    tdc::few_wgrad_threads(tdc::kFewEntries), 4)                                                               \
  X(tdc_conv_few_wgrad_##suffix##_64, tdc::ConvFewWgradParams, (tdc::conv_few_wgrad<T, tdc::kFewMostEntries>), \
    tdc::few_wgrad_threads(tdc::kFewMostEntries), 2)                                                           \
  X(tdc_conv_few_wgrad_reduce_##suffix, tdc::ConvFewWgradParams, (tdc::conv_few_reduce<T>), tdc::kFewReduceThreads)

#define TDC_KERNELS_conv_few_wgrad(X)    \
  TDC_CONV_FEW_WGRAD(X, bf16, tdc::bf16) \
  TDC_CONV_FEW_WGRAD(X, fp16, tdc::half)
