"""Routed convolution against one dense convolution, a loop over groups, and the grouped-convolution trick; fp32."""

from __future__ import annotations

import pytest
import torch

from bench import peers
from bench.cases import CONV_CASES, ConvCase, ConvInputs
from bench.compare import compare
from tdc_fast import routed_conv2d

by_case = pytest.mark.parametrize("case", CONV_CASES, ids=str)


@by_case
def test_forward(benchmark, case: ConvCase):
    p = ConvInputs(case)
    # A copy of x for each peer, as ours has one: otherwise a peer finds in the cache what the one before it has read.
    x_dense, x_loop, x_grouped = p.x, p.x.clone(), p.x.clone()
    with torch.no_grad():
        compare(
            benchmark,
            lambda: routed_conv2d(p.sorted_x, p.weight, p.bias, p.plan, padding=p.padding),
            {
                "dense": lambda: peers.dense(x_dense, p.weight[0], p.bias[0], p.padding),
                "loop": lambda: peers.loop(x_loop, p.weight, p.bias, p.groups, p.padding),
                "grouped": lambda: peers.grouped(x_grouped, p.weight, p.bias, p.groups, p.padding),
            },
        )


@by_case
def test_backward(benchmark, case: ConvCase):
    """Gradients of x, weight and bias; the forward is not timed."""
    p = ConvInputs(case)

    def backward_of(forward, *tensors):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        y = forward(*leaves)
        return lambda: torch.autograd.grad(y, leaves, p.dy, retain_graph=True)

    compare(
        benchmark,
        backward_of(lambda x, w, b: routed_conv2d(x, w, b, p.plan, padding=p.padding), p.sorted_x, p.weight, p.bias),
        {
            "dense": backward_of(lambda x, w, b: peers.dense(x, w, b, p.padding), p.x, p.weight[0], p.bias[0]),
            "loop": backward_of(lambda x, w, b: loop_backward(x, w, b, p), p.x, p.weight, p.bias),
        },
    )


def loop_backward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, p: ConvInputs) -> torch.Tensor:
    """The loop peer in a form that autograd supports: results are concatenated, not written into a tensor."""
    indices = [(p.groups == g).nonzero().squeeze(1) for g in range(weight.shape[0])]
    parts = [
        peers.dense(x.index_select(0, i), weight[g], bias[g], p.padding) for g, i in enumerate(indices) if i.numel()
    ]
    return torch.cat(parts).index_select(0, torch.cat(indices).argsort())


@by_case
def test_half_widths(benchmark, case: ConvCase):
    """Half of the input and half of the output channels live, against the same call at full width."""
    p = ConvInputs(case)
    half = p.half_widths()
    with torch.no_grad():
        compare(
            benchmark,
            lambda: routed_conv2d(
                p.sorted_x, p.weight, p.bias, p.plan, padding=p.padding, in_widths=half, out_widths=half
            ),
            {"full width": lambda: routed_conv2d(p.sorted_x, p.weight, p.bias, p.plan, padding=p.padding)},
        )
