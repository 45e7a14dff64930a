// The kernels of the forward convolution: X(name, threads, Params).
#pragma once

#include "cuda/conv_kernels.h"

#define TDC_CONV_FORWARD_KERNELS(X) TDC_CONV_VARIANTS(TDC_CONV_IMAGE_ENTRY, X, tdc_conv_forward)
