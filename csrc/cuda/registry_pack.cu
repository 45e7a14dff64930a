#include "cuda/pack_kernels.cuh"
#include "cuda/registry.h"

TDC_REGISTER_FAMILY(pack, TDC_PACK_KERNELS)
