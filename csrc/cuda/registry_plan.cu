#include "cuda/plan_kernels.cuh"
#include "cuda/registry.h"

TDC_REGISTER_FAMILY(plan, TDC_PLAN_KERNELS)
