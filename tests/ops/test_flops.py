"""FlopCounterMode counts the live channels of routed convolutions, forward and backward."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear


def flops(function) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts().get("Global", {}).items()}


def test_at_full_width_they_are_those_of_the_dense_convolution() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 1, 2]), 3)
    x, weight = torch.randn(4, 6, 7, 5, requires_grad=True), torch.randn(3, 8, 6, 3, 3, requires_grad=True)
    routed = flops(lambda: routed_conv2d(x, weight, None, plan, stride=2, padding=1).sum().backward())
    dense = flops(lambda: torch.conv2d(x, weight[0], None, 2, 1).sum().backward())
    assert routed["routed_conv2d"] == dense["convolution"]
    assert routed["routed_conv2d_dgrad"] + routed["routed_conv2d_wgrad"] == dense["convolution_backward"]


def test_only_live_channels_count() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 1, 2]), 3)
    widths = {
        "in_widths": torch.tensor([6, 2, 3], dtype=torch.int32),
        "out_widths": torch.tensor([1, 8, 0], dtype=torch.int32),
    }
    x, weight = torch.randn(4, 6, 7, 5, requires_grad=True), torch.randn(3, 8, 6, 3, 3, requires_grad=True)
    counted = flops(lambda: routed_conv2d(x, weight, None, plan, padding=1, **widths).sum().backward())
    expected = 2 * 7 * 5 * 9 * (1 * 6 * 1 + 2 * 2 * 8 + 1 * 3 * 0)
    assert counted == {name: expected for name in ("routed_conv2d", "routed_conv2d_dgrad", "routed_conv2d_wgrad")}


def test_what_is_not_computed_does_not_count() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0]), 1)
    x, weight, bias = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 3, 1, 1), torch.randn(1, 2, requires_grad=True)
    counted = flops(lambda: routed_conv2d(x, weight, bias, plan).sum().backward())
    assert counted.get("routed_conv2d_dgrad", 0) == counted.get("routed_conv2d_wgrad", 0) == 0


def test_linear_layers_count_as_matrix_products_and_norms_as_nothing() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    weight, bias = torch.randn(2, 4, 3), torch.randn(2, 4, requires_grad=True)
    for shape, tokens in (((2, 5, 3), 5), ((2, 3), 1)):
        x = torch.randn(shape, requires_grad=True)
        assert flops(lambda x=x: routed_linear(x, weight, bias, plan).sum().backward()) == {
            "routed_linear": 2 * 2 * tokens * 3 * 4, "routed_linear_dgrad": 2 * 2 * tokens * 3 * 4,
            "routed_linear_wgrad": 0,
        }  # fmt: skip
    x, widths = torch.randn(2, 5, 3), torch.tensor([1, 3], dtype=torch.int32)
    counted = flops(lambda: routed_linear(x, weight.requires_grad_(), bias, plan, in_widths=widths).sum().backward())
    assert counted == {"routed_linear": 2 * 5 * (1 + 3) * 4, "routed_linear_wgrad": 2 * 5 * (1 + 3) * 4}
    norm = lambda: routed_group_norm(torch.randn(2, 4, 3, 3), *torch.randn(2, 2, 4), plan, num_groups=2)  # noqa: E731
    assert sum(flops(norm).values()) == 0


def test_the_counter_may_be_imported_after_the_library() -> None:
    """And importing the library alone brings in neither the counter nor triton. (Here it was imported before.)"""
    program = """
import sys, torch
from tdc_fast import RoutingPlan, routed_conv2d
assert not any(m in sys.modules for m in ("torch.utils.flop_counter", "triton")), "too much imported"
from torch.utils.flop_counter import FlopCounterMode
plan = RoutingPlan.from_groups(torch.tensor([0]), 1)
with FlopCounterMode(display=False) as counter:
    routed_conv2d(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 3, 1, 1), None, plan)
assert counter.get_total_flops() == 2 * 16 * 6, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
