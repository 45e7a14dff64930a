"""Routed GroupNorm + scale-shift + SiLU, fused, against the torch sequence that it replaces; fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.cases import group_ids
from bench.compare import compare
from tdc_fast import RoutingPlan, routed_group_norm

NUM_GROUPS = 8
NUM_NORM_GROUPS = 32
SHAPES = [(64, 32, 8, 8), (64, 64, 16, 16), (32, 128, 16, 16), (8, 128, 64, 64)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


class Problem:
    """The tensors of a shape, fp32 and channels_last, and the two functions that are compared."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        torch.manual_seed(0)
        batch, channels = shape[:2]
        self.x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        self.dy = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = torch.randn(NUM_GROUPS, channels), torch.randn(NUM_GROUPS, channels)
        self.scale, self.shift = torch.randn(batch, channels), torch.randn(batch, channels)
        self.plan = RoutingPlan.from_groups(group_ids(batch, NUM_GROUPS), NUM_GROUPS)

    def routed(self, x, weight, bias, scale, shift):
        """The fused operator."""
        return routed_group_norm(
            x,
            weight,
            bias,
            self.plan,
            num_groups=NUM_NORM_GROUPS,
            scale=scale,
            shift=shift,
            activation="silu",
        )

    def dense(self, x, weight, bias, scale, shift):
        """Torch's sequence with one expert's weight and bias."""
        h = F.group_norm(x, NUM_NORM_GROUPS, weight[0], bias[0])
        return F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def leaves(self):
        """Copies of the inputs that take gradients."""
        return [t.detach().clone().requires_grad_() for t in (self.x, self.weight, self.bias, self.scale, self.shift)]


@by_shape
def test_forward(benchmark, shape):
    p = Problem(shape)
    arguments = (p.x, p.weight, p.bias, p.scale, p.shift)
    with torch.no_grad():
        compare(benchmark, lambda: p.routed(*arguments), {"torch sequence": lambda: p.dense(*arguments)})


@by_shape
def test_backward(benchmark, shape):
    p = Problem(shape)

    def backward_of(forward):
        leaves = p.leaves()
        y = forward(*leaves)
        return lambda: torch.autograd.grad(y, leaves, p.dy, retain_graph=True)

    compare(benchmark, backward_of(p.routed), {"torch sequence": backward_of(p.dense)})
