// The kernels of the routing plan: X(name, threads, Params).
#pragma once

#include "cuda/plan_params.h"

#define TDC_PLAN_KERNELS(X) X(tdc_routing_plan, 1024, tdc::RoutingPlanParams)
