"""Bias gradients of a routed convolution: sums of dy over each sample's pixels, then over each expert's samples.

A program sums one sample's pixels for a block of neighbouring channels. Each element of its tile keeps its own sum; the
tile's rows are added by a tree at the end, so the order of the additions is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels.common import live_width
from tdc_fast.kernels.expert_sums import group_of_sample, sum_per_expert
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors

_BLOCK_CHANNELS = 64
_BLOCK_PIXELS = 64
_INTEGERS = ("channels", "pixels", "num_groups")


@triton.jit(do_not_specialize=_INTEGERS)
def channel_sums_kernel(
    dy,  # (B, pixels, C)
    rounded,  # (B, C) of the dtype of dy, or None
    exact,  # (B, C) fp32, or None
    offsets,
    widths,  # (N,) or None
    channels,
    pixels,
    num_groups,
    VECTOR: tl.constexpr,  # divides channels: a masked load may access this many at once
    GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Sums dy over the pixels: program sample, block of channels."""
    sample = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.arange(0, BLOCK_PIXELS)
    stride = (channels // VECTOR) * VECTOR
    start = sample.to(tl.int64) * pixels * stride
    tile = row[:, None] * stride + column[None, :]
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for pixel in range(0, pixels, BLOCK_PIXELS):
        mask = (row < pixels - pixel)[:, None] & (column < stride)[None, :]
        total += tl.load(dy + start + pixel * stride + tile, mask=mask, other=0.0).to(tl.float32)
    live = live_width(widths, group_of_sample(offsets, sample, num_groups, GROUPS), channels)
    value = tl.where(column < live, tl.sum(total, 0), 0.0)
    place = sample.to(tl.int64) * channels + column
    if rounded is not None:
        tl.store(rounded + place, value.to(rounded.dtype.element_ty), mask=column < channels)
    if exact is not None:
        tl.store(exact + place, value, mask=column < channels)


def channel_sums(
    problem: ConvProblem, dy: Tensor, t: ConvTensors, want_bias: bool, want_sample_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Computes the bias gradients, summed in fp32. dbias takes a second launch, which adds the samples' sums.

    Args:
        problem: It has at least one sample.
        dy: (B, C_out, OH, OW) in channels_last memory.
        t: Only offsets, weight_index and out_widths are used, all contiguous.
        want_bias: Whether to compute dbias.
        want_sample_bias: Whether to compute dsample_bias.

    Returns:
        dbias (E, C_out) and dsample_bias (B, C_out), None where not wanted; dead channels are exact zeros.
    """
    shape = (problem.batch, problem.out_channels)
    dsample_bias = dy.new_empty(shape) if want_sample_bias else None
    shares = dy.new_empty(shape, dtype=torch.float32) if want_bias else None
    sums_launch(problem, dy, t, dsample_bias, shares).run()
    if shares is None:
        return None, dsample_bias
    dbias = dy.new_empty((problem.num_experts, problem.out_channels))
    sum_per_expert((shares,), (dbias,), t.offsets, t.weight_index)
    return dbias, dsample_bias


def sums_launch(
    problem: ConvProblem, dy: Tensor, t: ConvTensors, rounded: Tensor | None, exact: Tensor | None
) -> Launch:
    """The launch that sums over pixels, into `rounded` (dtype of dy) and `exact` (fp32) where they are not None."""
    vector = 16 // dy.element_size()
    while problem.out_channels % vector:
        vector //= 2
    tensors: dict[str, Any] = {
        "dy": dy,
        "rounded": rounded,
        "exact": exact,
        "offsets": t.offsets,
        "widths": t.out_widths,
    }
    constants = {
        "channels": problem.out_channels,
        "pixels": problem.out_height * problem.out_width,
        "num_groups": problem.num_groups,
        "VECTOR": vector,
        "GROUPS": triton.next_power_of_2(problem.num_groups),
        "BLOCK_CHANNELS": _BLOCK_CHANNELS,
        "BLOCK_PIXELS": _BLOCK_PIXELS,
    }
    grid = (problem.batch, triton.cdiv(problem.out_channels, _BLOCK_CHANNELS))
    return Launch(channel_sums_kernel, grid, tensors, constants, {"num_warps": 4}, key=problem)
