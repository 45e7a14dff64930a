#include "cuda/group_norm_kernels.cuh"
#include "cuda/registry.h"

TDC_REGISTER_FAMILY(group_norm, TDC_GROUP_NORM_KERNELS)
