"""Routed convolution, gradient of its input: dx[b] = conv2d_input(dy[b], weight[e(b)]).

The kernels are those of the forward, on the forward's weights in place. With a stride, pixels are split into classes by
their coordinates modulo the stride: a class is reached by every stride-th tap, so no product is spent on taps that do
not reach a pixel. The cost: a program of one class writes every other pixel, and classes have between none and
ceil(R / 2) ceil(S / 2) taps, so programs are of unequal length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.tile_shapes import ConvTile


def conv_dgrad(
    problem: Any,
    dy: Tensor,
    weight: Tensor,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    *,
    tile: ConvTile | None = None,
) -> Tensor:
    """One launch; arguments as in `conv_forward`, dy (B, C_out, OH, OW) in channels_last memory.

    Returns dx (B, C_in, H, W), channels_last, its dead channels exact zeros. Dead channels of dy are not used.
    """
    shape = (problem.batch, problem.in_channels, problem.height, problem.width)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    conv_launch(
        "dgrad", problem, dy, weight, None, None, None, dx, tiles, weight_index, out_widths, in_widths, tile
    ).run()
    return dx
