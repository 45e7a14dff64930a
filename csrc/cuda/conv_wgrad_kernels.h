// The kernels of wgrad, of its reduction over splits, and of the channel sums: X(name, threads, Params).
#pragma once

#include "cuda/conv_kernels.h"

// M(X, suffix, element type)
#define TDC_CONV_SUM_TYPES(M, X) M(X, fp32, float) M(X, bf16, tdc::bf16) M(X, fp16, tdc::half)

#define TDC_CONV_SUM_ENTRIES(X, suffix, T)                                         \
  X(tdc_conv_reduce_##suffix, tdc::kConvSumThreads, tdc::ConvReduceParams)         \
  X(tdc_conv_sample_sums_##suffix, tdc::kConvSumThreads, tdc::ConvSampleSumParams) \
  X(tdc_conv_expert_sums_##suffix, tdc::kConvSumThreads, tdc::ConvExpertSumParams)

#define TDC_CONV_WGRAD_KERNELS(X)                            \
  TDC_CONV_VARIANTS(TDC_CONV_WGRAD_ENTRY, X, tdc_conv_wgrad) \
  TDC_CONV_SUM_TYPES(TDC_CONV_SUM_ENTRIES, X)
