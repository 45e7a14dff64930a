"""Routed group norm, scale-shift and SiLU, forward and backward, over NHWC memory: shapes, tiles and launches.

A program owns one sample and a block of neighbouring channels that are whole norm groups, so that every row it reads is
one contiguous piece (norm_kernels.py). Nothing here is read back; grids come from shapes alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tdc_fast.kernels.expert_sums import sum_per_expert
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.norm_kernels import norm_backward_kernel, norm_forward_kernel

MAX_CHANNELS_PER_GROUP = 2048  # wider ones leave registers
TILE_ELEMENTS = 2048


@dataclass(frozen=True)
class NormTile:
    """What one program owns: `span` channels (whole norm groups), walked in tiles of block_pixels x block_channels."""

    span: int
    vector: int
    block_groups: int
    block_channels: int
    block_pixels: int
    num_warps: int


def norm_tile(channels: int, per_group: int, pixels: int, itemsize: int, backward: bool) -> NormTile:
    """The narrowest block of whole norm groups whose rows are 64 contiguous bytes, so that small batches still fill a
    device. A thread holds 16 elements of a tile, in the backward 8: there it keeps four such arrays in registers.
    """
    groups, norm_groups = 1, channels // per_group
    while groups < min(norm_groups, 32) and groups * per_group * itemsize < 64:
        groups *= 2
    span = min(groups, norm_groups) * per_group
    vector = 16 // itemsize
    while channels % vector or span % vector:
        vector //= 2
    block_channels = triton.next_power_of_2(span)
    block_pixels = max(1, min(triton.next_power_of_2(pixels), TILE_ELEMENTS // block_channels))
    fewest, most = (8, 16) if backward else (4, 8)
    num_warps = min(most, max(fewest, block_channels // 128))  # a thread keeps some rows of channels, too
    return NormTile(span, vector, triton.next_power_of_2(groups), block_channels, block_pixels, num_warps)


def norm_supported(problem: Any) -> str | None:
    """None, or why these kernels cannot serve the problem."""
    if problem.channels_per_group > MAX_CHANNELS_PER_GROUP:
        return f"it has norm groups of at most {MAX_CHANNELS_PER_GROUP} channels, not {problem.channels_per_group}"
    if problem.height * problem.width * problem.channels >= 2**31:
        return "a sample must have fewer than 2**31 elements"
    return None


def norm_forward_launch(p: Any, tensors: dict[str, Tensor | None]) -> Launch:
    """The launch for what `tensors` names: all tensor arguments of the forward kernel."""
    grid, constants, options = _constants(p, backward=False)
    return Launch(norm_forward_kernel, grid, tensors, constants, options, key=p)


def norm_backward_launch(p: Any, tensors: dict[str, Tensor | None]) -> Launch:
    """The launch for what `tensors` names: all tensor arguments of the backward kernel."""
    grid, constants, options = _constants(p, backward=True)
    return Launch(norm_backward_kernel, grid, tensors, constants, options, key=p)


@functools.lru_cache(maxsize=4096)
def _constants(p: Any, backward: bool) -> tuple[tuple[int, int], dict[str, Any], dict[str, int]]:
    """(grid, the arguments that are no tensors, the compiler's options)."""
    per_group, pixels = p.channels // p.num_norm_groups, p.height * p.width
    tile = norm_tile(p.channels, per_group, pixels, p.dtype.itemsize, backward)
    constants = {
        "channels": p.channels,
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


def group_norm_forward(
    p: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, C, H, W) channels_last, mean and rstd (B, norm groups) fp32, in one launch.

    p: a NormProblem that `norm_supported`. x: channels_last; everything else dense, of the dtype of x or int32.
    """
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    inputs = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}
    routing = {"offsets": offsets, "weight_index": weight_index, "widths": widths}
    norm_forward_launch(p, {**inputs, "y": y, "mean": mean, "rstd": rstd, **routing}).run()
    return y, mean, rstd


def group_norm_backward(
    p: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
    mask: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx (B, C, H, W) channels_last, dweight and dbias (E, C), dscale and dshift (B, C); None where unmasked.

    Preconditions as for the forward. dweight and dbias go through fp32 shares per sample and a second launch.
    """
    per_sample = (p.batch, p.channels)
    made: dict[str, Tensor | None] = {
        "dx": torch.empty_like(x, memory_format=torch.channels_last) if mask[0] else None,
        "dweight": x.new_empty(per_sample, dtype=torch.float32) if mask[1] else None,
        "dbias": x.new_empty(per_sample, dtype=torch.float32) if mask[2] else None,
        "dscale": x.new_empty(per_sample) if mask[3] else None,
        "dshift": x.new_empty(per_sample) if mask[4] else None,
    }
    inputs = {"dy": dy, "x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}
    routing = {"offsets": offsets, "weight_index": weight_index, "widths": widths}
    norm_backward_launch(p, {**inputs, "mean": mean, "rstd": rstd, **made, **routing}).run()
    shares = {name: share for name in ("dweight", "dbias") if (share := made[name]) is not None}
    sums = {name: torch.empty_like(weight) for name in shares}
    if shares:
        sum_per_expert(tuple(shares.values()), tuple(sums.values()), offsets, weight_index)
    return made["dx"], sums.get("dweight"), sums.get("dbias"), made["dscale"], made["dshift"]
