#include "cuda/conv_dgrad_kernels.cuh"
#include "cuda/registry.h"

TDC_REGISTER_FAMILY(conv_dgrad, TDC_CONV_DGRAD_KERNELS)
