// The kernels of the routing plan: X(name, Params, (function), threads).
#pragma once

#include "cuda/plan/params.h"

#define TDC_KERNELS_plan(X) X(tdc_routing_plan, tdc::RoutingPlanParams, (tdc::routing_plan), 1024)
