"""Routed group norm, scale-shift and SiLU, forward and backward, over NHWC memory: shapes, tiles and launches.

A program computes one sample's block of neighbouring channels, which are whole norm groups, so every row that it reads
is contiguous (norm_kernels.py). Nothing is read back; grids depend on shapes alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tdc_fast.kernels.expert_sums import MAX_AT_ONCE, sum_per_expert
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.norm_kernels import norm_backward_kernel, norm_forward_kernel
from tdc_fast.kernels.problems import NormProblem, NormTensors

MAX_CHANNELS_PER_GROUP = 2048  # wider groups do not fit in registers
TILE_ELEMENTS = 2048


@dataclass(frozen=True)
class NormTile:
    """What one program computes.

    Attributes:
        span: Channels of a program, whole norm groups.
        vector: Channels of one memory access; divides span.
        block_groups: Norm groups of a program, rounded up to a power of two.
        block_channels: Channels of a tile, span rounded up to a power of two.
        block_pixels: Pixels of a tile.
        num_warps: Warps of a program.
    """

    span: int
    vector: int
    block_groups: int
    block_channels: int
    block_pixels: int
    num_warps: int


def norm_tile(
    channels: int, per_group: int, pixels: int, itemsize: int, backward: bool, x2_channels: int = 0
) -> NormTile:
    """The narrowest block of whole norm groups with rows of 64 bytes or more, so that small batches fill a device.

    A thread holds 16 elements of a tile in the forward, and 8 in the backward, which keeps four such arrays in
    registers. A memory access never straddles the seam between x and x2.
    """
    groups, norm_groups = 1, channels // per_group
    while groups < min(norm_groups, 32) and groups * per_group * itemsize < 64:
        groups *= 2
    span = min(groups, norm_groups) * per_group
    vector = 16 // itemsize
    while channels % vector or span % vector or x2_channels % vector:
        vector //= 2
    block_channels = triton.next_power_of_2(span)
    block_pixels = max(1, min(triton.next_power_of_2(pixels), TILE_ELEMENTS // block_channels))
    fewest, most = (8, 16) if backward else (4, 8)
    num_warps = min(most, max(fewest, block_channels // 128))  # a thread also keeps some rows of channels
    return NormTile(span, vector, triton.next_power_of_2(groups), block_channels, block_pixels, num_warps)


def norm_supported(problem: NormProblem) -> str | None:
    """None, or why these kernels cannot serve the problem."""
    if problem.channels_per_group > MAX_CHANNELS_PER_GROUP:
        return f"it has norm groups of at most {MAX_CHANNELS_PER_GROUP} channels, not {problem.channels_per_group}"
    if problem.height * problem.width * problem.channels >= 2**31:
        return "a sample must have fewer than 2**31 elements"
    return None


def norm_forward_launch(p: NormProblem, tensors: dict[str, Tensor | None]) -> Launch:
    """The launch of the forward kernel; `tensors` has all its tensor arguments by name."""
    grid, constants, options = _constants(p, backward=False)
    return Launch(norm_forward_kernel, grid, tensors, constants, options, key=p)


def norm_backward_launch(p: NormProblem, tensors: dict[str, Tensor | None]) -> Launch:
    """The launch of the backward kernel; `tensors` has all its tensor arguments by name."""
    grid, constants, options = _constants(p, backward=True)
    return Launch(norm_backward_kernel, grid, tensors, constants, options, key=p)


@functools.lru_cache(maxsize=4096)
def _constants(p: NormProblem, backward: bool) -> tuple[tuple[int, int], dict[str, Any], dict[str, int]]:
    """(grid, the arguments that are not tensors, the compiler's options)."""
    per_group, pixels = p.channels_per_group, p.height * p.width
    tile = norm_tile(p.channels, per_group, pixels, p.dtype.itemsize, backward, p.x2_channels)
    constants: dict[str, Any] = {
        "channels": p.channels,
        "x2_channels": p.x2_channels,
        "pixels": pixels,
        "per_group": per_group,
        "span": tile.span,
        "norm_groups": p.num_norm_groups,
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
        "SILU": p.silu,
        "VECTOR": tile.vector,
        "GROUPS": triton.next_power_of_2(p.num_groups),
        "BLOCK_GROUPS": tile.block_groups,
        "BLOCK_CHANNELS": tile.block_channels,
        "BLOCK_PIXELS": tile.block_pixels,
    }
    if not backward:
        constants["eps"] = p.eps
    return (p.batch, triton.cdiv(p.channels, tile.span)), constants, {"num_warps": tile.num_warps}


def group_norm_forward(p: NormProblem, t: NormTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the forward in one launch.

    Args:
        p: One that `norm_supported` accepts.
        t: x and x2 in channels_last memory, everything else contiguous.

    Returns:
        y (B, C, H, W) channels_last, mean and rstd (B, norm groups) fp32, counters for the backward (NormTensors).
    """
    y = _empty_image(p, t.x, p.channels)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32, device=t.x.device)
    rstd = torch.empty_like(mean)
    make = torch.empty if p.batch else torch.zeros
    counters = make((p.num_experts, p.num_norm_groups), dtype=torch.int32, device=t.x.device)
    norm_forward_launch(p, {**t._asdict(), "y": y, "mean": mean, "rstd": rstd, "counters": counters}).run()
    return y, mean, rstd, counters


def group_norm_backward(
    p: NormProblem,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    t: NormTensors,
    mask: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Computes the gradients in one launch, or two where samples are many.

    dweight and dbias are summed from fp32 values per sample.

    Args:
        p: One that `norm_supported` accepts.
        dy: (B, C, H, W) in channels_last memory.
        mean: (B, norm groups) fp32, of the forward.
        rstd: (B, norm groups) fp32, of the forward.
        t: As in the forward.
        mask: Which results to compute.

    Returns:
        dx (B, C - C_2, H, W) channels_last, dweight and dbias (E, C), dscale and dshift (B, C), dx2 like dx; None where
        not in the mask.
    """
    per_sample = (p.batch, p.channels)
    wants_input = mask[0] or mask[5]
    made: dict[str, Tensor | None] = {
        "dx": _empty_image(p, t.x, p.channels - p.x2_channels) if wants_input else None,
        "dx2": _empty_image(p, t.x, p.x2_channels) if wants_input and p.x2_channels else None,
        "dweight_share": t.x.new_empty(per_sample, dtype=torch.float32) if mask[1] else None,
        "dbias_share": t.x.new_empty(per_sample, dtype=torch.float32) if mask[2] else None,
        "dscale": t.x.new_empty(per_sample) if mask[3] else None,
        "dshift": t.x.new_empty(per_sample) if mask[4] else None,
    }
    dweight, dbias = (torch.empty_like(t.weight) if wanted else None for wanted in mask[1:3])
    at_once = (mask[1] or mask[2]) and t.counters is not None and 0 < p.batch <= MAX_AT_ONCE
    summed = {"dweight": dweight, "dbias": dbias} if at_once else {"dweight": None, "dbias": None, "counters": None}
    norm_backward_launch(p, {**t._asdict(), "dy": dy, "mean": mean, "rstd": rstd, **made, **summed}).run()
    if not at_once:
        pairs = ((made["dweight_share"], dweight), (made["dbias_share"], dbias))
        wanted = [(share, out) for share, out in pairs if share is not None and out is not None]
        if wanted:
            shares, outs = zip(*wanted, strict=True)
            sum_per_expert(shares, outs, t.offsets, t.weight_index)
    dx, dx2 = made["dx"] if mask[0] else None, made["dx2"] if mask[5] else None
    return dx, dweight, dbias, made["dscale"], made["dshift"], dx2


def _empty_image(p: NormProblem, like: Tensor, channels: int) -> Tensor:
    shape = (p.batch, channels, p.height, p.width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
