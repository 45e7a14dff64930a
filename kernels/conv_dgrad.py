"""Routed convolution, gradient of its input: dx[b] = conv2d_input(dy[b], weight[e(b)]).

The kernels are those of the forward, on the forward's weights in place. With a stride, pixels are split into classes by
their coordinates modulo the stride: only every stride-th tap reaches a class, so no product is spent on taps that do
not reach a pixel. In return, a program writes only every other pixel, and classes have from 0 to
ceil(R / 2) ceil(S / 2) taps, so programs differ in length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.tile_shapes import ConvTile


def conv_dgrad(
    problem: ConvProblem, dy: Tensor, t: ConvTensors, *, tile: ConvTile | None = None
) -> tuple[Tensor, Tensor | None]:
    """Computes dgrad in one launch; sums are in fp32, and nothing is read back.

    Args:
        problem: One that `conv_supported` accepts.
        dy: (B, C_out, OH, OW) in channels_last memory. Its dead channels are not used, except where the problem's
            `dead_zeros` says that they are zeros.
        t: As in `conv_forward`; x and the epilogue's tensors are not used.
        tile: Overrides the choice (benches and tests).

    Returns:
        dx (B, C_in - C_2, H, W) and dx2 (B, C_2, H, W) or None, channels_last, dead channels exact zeros.
    """

    def empty(channels: int) -> Tensor:
        shape = (problem.batch, channels, problem.height, problem.width)
        return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)

    dx = empty(problem.in_channels - problem.x2_channels)
    dx2 = empty(problem.x2_channels) if problem.x2_channels else None
    conv_launch("dgrad", problem, dy, t, dx, tile, dx2, epilogue=False, dead_zeros=problem.dead_zeros).run()
    return dx, dx2
