"""Routed convolution, forward: y[b] = conv2d(x[b], weight[e(b)]) + bias[e(b)] + sample_bias[b] + residual[b]."""

from __future__ import annotations

import torch
from torch import Tensor

from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.conv_launch import conv_supported as conv_supported
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.tile_shapes import ConvTile


def conv_forward(
    problem: ConvProblem, t: ConvTensors, *, tile: ConvTile | None = None, dead_zeros: bool = True
) -> Tensor:
    """Computes the forward in one launch; sums are in fp32, and nothing is read back.

    Args:
        problem: One that `conv_supported` accepts.
        t: x and residual in channels_last memory; weight in memory order E, C_out, R, S, C_in; the rest contiguous.
        tile: Overrides the choice (benches and tests).
        dead_zeros: Whether x is zero past the widths, as it is in every call of the operator.

    Returns:
        y (B, C_out, OH, OW), channels_last, its dead channels exact zeros.
    """
    shape = (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
    y = torch.empty(shape, dtype=t.x.dtype, device=t.x.device, memory_format=torch.channels_last)
    conv_launch("forward", problem, t.x, t, y, tile, dead_zeros=dead_zeros).run()
    return y
