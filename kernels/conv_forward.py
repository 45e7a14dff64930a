"""Routed convolution, forward: y[b] = conv2d(x[b], weight[e(b)]) + bias[e(b)] + sample_bias[b] + residual[b]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.conv_launch import conv_supported as conv_supported
from tdc_fast.kernels.tile_shapes import ConvTile


def conv_forward(
    problem: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    *,
    tile: ConvTile | None = None,
) -> Tensor:
    """One launch; sums in fp32; nothing is read back.

    problem: a ConvProblem that `conv_supported`. x (B, C_in, H, W) and residual (B, C_out, OH, OW) in channels_last
    memory; weight (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in; bias (E, C_out), sample_bias (B, C_out),
    tiles (rows, 3) (tdc_fast.kernels.tile_table), weight_index and widths (N,) int32, all contiguous.
    tile: runs this one instead of the chosen one (benches and tests).
    Returns y (B, C_out, OH, OW), channels_last, its dead channels exact zeros.
    """
    shape = (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    conv_launch(
        "forward", problem, x, weight, bias, sample_bias, residual, y, tiles, weight_index, in_widths, out_widths, tile
    ).run()
    return y
