"""The three operators of the library: routing plan, routed convolution (and linear), routed group norm."""

from __future__ import annotations

from tdc_fast.ops import builtin as builtin
from tdc_fast.ops import flops
from tdc_fast.ops.backends import Explanation, available_backends, explain, reads_two_inputs
from tdc_fast.ops.conv2d import routed_conv2d
from tdc_fast.ops.group_norm import routed_group_norm
from tdc_fast.ops.linear import routed_linear

__all__ = [
    "Explanation",
    "available_backends",
    "explain",
    "reads_two_inputs",
    "routed_conv2d",
    "routed_group_norm",
    "routed_linear",
]

flops.register()
