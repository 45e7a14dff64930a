// Instantiates the kernel of the routing plan.
#pragma once

#include "cuda/plan.cuh"
#include "cuda/plan_kernels.h"

TDC_KERNEL(tdc_routing_plan, 1024, tdc::RoutingPlanParams) { tdc::routing_plan(p); }
