#include "cuda/conv_forward_kernels.cuh"
#include "cuda/registry.h"

TDC_REGISTER_FAMILY(conv_forward, TDC_CONV_FORWARD_KERNELS)
