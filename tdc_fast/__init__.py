"""tdc_fast: two-stage divide-and-conquer training for diffusion models, on group-routed kernels.

The names below load on first use, so that `import tdc_fast` takes little more than importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdc_fast.nn.inference import for_inference
    from tdc_fast.nn.packing import RoutedModel, pack_experts
    from tdc_fast.nn.width_plan import WidthPlan
    from tdc_fast.ops import explain, routed_conv2d, routed_group_norm, routed_linear
    from tdc_fast.routing import RoutingPlan, TimestepGroups

__version__ = "0.1.0"

_HOME = {
    "TimestepGroups": "tdc_fast.routing",
    "RoutingPlan": "tdc_fast.routing",
    "routed_conv2d": "tdc_fast.ops",
    "routed_linear": "tdc_fast.ops",
    "routed_group_norm": "tdc_fast.ops",
    "explain": "tdc_fast.ops",
    "for_inference": "tdc_fast.nn.inference",
    "pack_experts": "tdc_fast.nn.packing",
    "RoutedModel": "tdc_fast.nn.packing",
    "WidthPlan": "tdc_fast.nn.width_plan",
}

__all__ = [
    "RoutedModel",
    "RoutingPlan",
    "TimestepGroups",
    "WidthPlan",
    "explain",
    "for_inference",
    "pack_experts",
    "routed_conv2d",
    "routed_group_norm",
    "routed_linear",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tdc_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
