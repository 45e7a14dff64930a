#include "cuda/conv_wgrad_kernels.cuh"
#include "cuda/registry.h"

TDC_REGISTER_FAMILY(conv_wgrad, TDC_CONV_WGRAD_KERNELS)
