"""Routed convolution of an image that is upsampled to twice its size (nearest), without that image.

Nearest upsampling and a 3x3 convolution after it are the dgrad of a 4x4 convolution of stride 2: of the nine taps,
those that meet the same pixel of x are added first, and 4/9 of the products remain.

    rows of y      0 1 2 3 ..      w0 w1 w2 at row 0 meet x[-1] x[0] x[0], at row 1 x[0] x[0] x[1]
    rows of x      0 0 1 1 ..      merged: row 0 = w0 x[-1] + (w1 + w2) x[0], row 1 = (w0 + w1) x[0] + w2 x[1]

So the forward runs the kernel of dgrad, with an epilogue, and dgrad that of the forward, both on merged weights. These
are rounded to the dtype of the weights, which adds as much error as the rounding of the result: both together have 1.4
times the error of the one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels.conv_forward import conv_forward
from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors

_BLOCK = 32


@triton.jit
def merge_taps_kernel(
    weight,  # (E, C_out, R, S, C_in)
    merged,  # (E, C_in, R + 1, S + 1, C_out)
    in_channels,
    out_channels,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes a block of channels of one tap: program (expert and tap, block of C_in, block of C_out)."""
    taps: tl.constexpr = (R + 1) * (S + 1)
    expert, tap = tl.program_id(0) // taps, tl.program_id(0) % taps
    row, column = R - 1 - tap // (S + 1), S - 1 - tap % (S + 1)
    inputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    outputs = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (outputs < out_channels)[:, None] & (inputs < in_channels)[None, :]
    begin = expert.to(tl.int64) * (out_channels * R * S * in_channels)
    places = weight + begin + outputs[:, None] * (R * S * in_channels) + inputs[None, :]  # [C_out, C_in]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            r, s = row + a, column + b
            there = inside & (r >= 0) & (r < R) & (s >= 0) & (s < S)
            total += tl.load(places + (r * S + s) * in_channels, mask=there, other=0.0).to(tl.float32)
    begin = expert.to(tl.int64) * (in_channels * taps * out_channels)
    places = merged + begin + inputs[:, None] * (taps * out_channels) + tap * out_channels + outputs[None, :]
    tl.store(places, tl.trans(total).to(merged.dtype.element_ty), mask=tl.trans(inside))


def merge_launch(weight: Tensor, merged: Tensor) -> Launch:
    """The launch that writes the merged weights.

    Args:
        weight: (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in.
        merged: (E, C_in, C_out, R + 1, S + 1) in memory order E, C_in, R + 1, S + 1, C_out.
    """
    experts, out_channels, in_channels, rows, columns = weight.shape
    taps, blocks = experts * (rows + 1) * (columns + 1), (in_channels, out_channels)
    grid = (taps, *(triton.cdiv(channels, _BLOCK) for channels in blocks))
    constants = {"in_channels": in_channels, "out_channels": out_channels, "R": rows, "S": columns, "BLOCK": _BLOCK}
    tensors = {"weight": weight, "merged": merged}
    key = (weight.device, weight.dtype, *weight.shape)
    return Launch(merge_taps_kernel, grid, tensors, constants, {"num_warps": 4}, key)


def _merged(weight: Tensor) -> Tensor:
    experts, out_channels, in_channels, rows, columns = weight.shape
    memory = weight.new_empty((experts, in_channels, rows + 1, columns + 1, out_channels))
    merged = memory.permute(0, 1, 4, 2, 3)
    merge_launch(weight, merged).run()
    return merged


def _adjoint(t: ConvTensors, x: Tensor | None) -> ConvTensors:
    """The tensors of the adjoint problem with the input x; the epilogue's are those of t."""
    return t._replace(x=x, weight=_merged(t.weight), in_widths=t.out_widths, out_widths=t.in_widths)  # type: ignore[arg-type]


def upsampled_forward(problem: ConvProblem, t: ConvTensors) -> Tensor:
    """Computes the forward in two launches, as `conv_forward` does for other problems.

    Args:
        problem: One with upsampling that `conv_supported` accepts.
        t: As in `conv_forward`.

    Returns:
        y (B, C_out, OH, OW), channels_last, its dead channels exact zeros.
    """
    shape = (problem.batch, problem.out_channels, problem.out_height, problem.out_width)
    y = torch.empty(shape, dtype=t.x.dtype, device=t.x.device, memory_format=torch.channels_last)
    conv_launch("dgrad", problem.adjoint(), t.x, _adjoint(t, None), y).run()
    return y


def upsampled_dgrad(problem: ConvProblem, dy: Tensor, t: ConvTensors) -> Tensor:
    """Computes dx (B, C_in, H, W) in two launches, as `conv_dgrad` does for other problems."""
    plain = t._replace(bias=None, sample_bias=None, residual=None)
    return conv_forward(problem.adjoint(), _adjoint(plain, dy), dead_zeros=problem.dead_zeros)
