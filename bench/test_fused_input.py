"""Two inputs and upsampling read where they are, against making the tensor first and the same operator; fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import group_ids
from bench.compare import compare
from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm

BATCH, SIZE, NUM_GROUPS, NUM_NORM_GROUPS = 32, 16, 4, 32
SPLITS = [(128, 64), (256, 128)]  # channels of x and of the skip


class Problem:
    """An output block's input, as x and skip, and what reads it, over a batch that spans all groups."""

    def __init__(self, channels: int, skip_channels: int) -> None:
        torch.manual_seed(0)
        joined = channels + skip_channels
        self.plan = RoutingPlan.from_groups(torch.sort(group_ids(BATCH, NUM_GROUPS))[0], NUM_GROUPS)
        self.x, self.skip = self.image(channels), self.image(skip_channels)
        self.gain, self.offset = torch.randn(NUM_GROUPS, joined), torch.randn(NUM_GROUPS, joined)
        self.pointwise = torch.randn(NUM_GROUPS, channels, joined, 1, 1)
        self.filters = torch.randn(NUM_GROUPS, channels, channels, 3, 3)

    def image(self, channels: int) -> Tensor:
        """A batch of images (B, C, H, W), channels_last."""
        return torch.randn(BATCH, channels, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def norm(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The norm that an output block begins with."""
        affine = (self.gain, self.offset, self.plan)
        return routed_group_norm(x, *affine, num_groups=NUM_NORM_GROUPS, activation="silu", x2=skip)

    def skip_path(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The convolution of its skip path."""
        return routed_conv2d(x, self.pointwise, None, self.plan, x2=skip)


def forward_and_backward(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    """A call that computes the function and the gradients of its tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    dy = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "C{}+{}".format(*split))
def test_two_inputs_of_a_norm_and_a_skip_path(benchmark, split):
    p = Problem(*split)

    def first_joined(x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([x, skip], dim=1)
        return torch.cat([p.norm(x, None), p.skip_path(x, None)], dim=1)

    def both_read(x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([p.norm(x, skip), p.skip_path(x, skip)], dim=1)

    inputs = (p.x, p.skip)
    peers = {"torch.cat first": forward_and_backward(first_joined, *inputs)}
    compare(benchmark, forward_and_backward(both_read, *inputs), peers)


@pytest.mark.parametrize("channels", [64, 128], ids="C{}".format)
def test_upsampling(benchmark, channels):
    p = Problem(channels, 32)
    peers = {
        "interpolate first": forward_and_backward(
            lambda x, w: routed_conv2d(F.interpolate(x, scale_factor=2), w, None, p.plan, padding=1), p.x, p.filters
        )
    }
    ours = forward_and_backward(lambda x, w: routed_conv2d(x, w, None, p.plan, padding=1, upsample=2), p.x, p.filters)
    compare(benchmark, ours, peers)
