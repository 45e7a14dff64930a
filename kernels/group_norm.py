"""Routed group norm, scale-shift and SiLU, forward and backward, over NHWC memory.

A program owns one sample and a block of whole norm groups: BLOCK_CHANNELS neighbouring channels, so that every row it
reads is one contiguous piece. It walks the image in tiles of [BLOCK_PIXELS, BLOCK_CHANNELS], every element keeping its own
running sums; what belongs together is combined once, at the end: pixels by a tree, then channels into norm groups by a
small membership matrix. The image is walked twice; the second time it comes from the cache.

    pixels |  tile 0  | c0 .. c1 |        running mean and M2 of every element (Welford)
           |  tile 1  | c0 .. c1 |   ->   channel: mean, M2   ->   norm group: mean, rstd
           |   ...    | c0 .. c1 |        second walk: (x - mean) * rstd, affine, scale, shift, SiLU
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels.common import expert_of, live_width
from tdc_fast.kernels.expert_sums import group_of_sample, sum_per_expert

MAX_CHANNELS_PER_GROUP = 4096
TILE_ELEMENTS = 2048
_INTEGERS = ("channels", "pixels", "per_group", "span", "norm_groups", "num_groups", "num_experts", "eps")


@triton.jit
def _affine_rows(weight, bias, scale, shift, expert, sample, columns, channels, live):
    """[BC] fp32, zero where dead: expert's weight and bias, 1 + the sample's scale, its shift."""
    place = expert.to(tl.int64) * channels + columns
    gain = tl.load(weight + place, mask=live, other=0.0).to(tl.float32)
    offset = tl.load(bias + place, mask=live, other=0.0).to(tl.float32)
    place = sample.to(tl.int64) * channels + columns
    factor = tl.zeros_like(gain) + 1.0
    if scale is not None:
        factor += tl.load(scale + place, mask=live, other=0.0).to(tl.float32)
    addend = tl.zeros_like(gain)
    if shift is not None:
        addend += tl.load(shift + place, mask=live, other=0.0).to(tl.float32)
    return gain, offset, factor, addend


@triton.jit
def _group_sums(values, member):
    """[BC] values -> [BG] sums over the channels of each norm group."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def _of_channels(values, member):
    """[BG] values of norm groups -> [BC], each channel that of its group."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _block(span, per_group, channels, VECTOR: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """This program's channels: (first, [BC] relative column, [BC] inside the block, [BG, BC] membership in norm groups).

    VECTOR divides channels and span; saying so lets a thread's masked load stay one 16-byte access.
    """
    first = tl.program_id(1) * ((span // VECTOR) * VECTOR)
    size = tl.minimum((span // VECTOR) * VECTOR, ((channels - first) // VECTOR) * VECTOR)
    column = tl.arange(0, BLOCK_CHANNELS)
    inside = column < size
    member = (column // per_group)[None, :] == tl.arange(0, BLOCK_GROUPS)[:, None]
    return first, column, inside, member & inside[None, :]


@triton.jit(do_not_specialize=_INTEGERS)
def _forward(
    x,  # (B, pixels, C)
    weight,  # (E, C)
    bias,  # (E, C)
    scale,  # (B, C) or None
    shift,  # (B, C) or None
    y,  # (B, pixels, C)
    mean,  # (B, norm groups) fp32
    rstd,  # (B, norm groups) fp32
    offsets,
    weight_index,
    widths,
    channels,
    pixels,
    per_group,  # channels of a norm group
    span,  # channels of a program
    norm_groups,
    num_groups,
    num_experts,
    eps,
    SILU: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    sample = tl.program_id(0)
    group = group_of_sample(offsets, sample, num_groups, GROUPS)
    expert = expert_of(weight_index, group, num_experts)
    first, column, inside, member = _block(span, per_group, channels, VECTOR, BLOCK_GROUPS, BLOCK_CHANNELS)
    live = inside & (first + column < live_width(widths, group, channels))
    row = tl.arange(0, BLOCK_PIXELS)
    stride = (channels // VECTOR) * VECTOR
    start = sample.to(tl.int64) * pixels * stride + first
    tile = row[:, None] * stride + column[None, :]  # [BP, BC]

    running = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    spread = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    seen = 0.0
    for pixel in range(0, pixels, BLOCK_PIXELS):
        valid = (row < pixels - pixel)[:, None]
        at = start + pixel * stride
        value = tl.load(x + at + tile, mask=valid & inside[None, :], other=0.0).to(tl.float32)
        value = tl.where(live[None, :], value, 0.0)
        seen += 1.0
        delta = tl.where(valid, value - running, 0.0)
        running += delta / seen
        spread += delta * tl.where(valid, value - running, 0.0)
    count = ((pixels - row + BLOCK_PIXELS - 1) // BLOCK_PIXELS).to(tl.float32)[:, None]  # pixels seen by each row
    channel_mean = tl.sum(running * count, 0) / pixels  # [BC]
    away = running - channel_mean[None, :]
    channel_spread = tl.sum(spread + tl.where(count > 0, away * away * count, 0.0), 0)
    group_mean = _group_sums(channel_mean, member) / per_group  # [BG]
    away_from_group = channel_mean - _of_channels(group_mean, member)
    variance = _group_sums(channel_spread + away_from_group * away_from_group * pixels, member) / per_group / pixels
    group_live = _group_sums(tl.where(live, 1.0, 0.0), member) > 0.0
    group_rstd = tl.where(group_live, 1.0 / tl.sqrt(variance + eps), 0.0)

    norm_group = first // per_group + tl.arange(0, BLOCK_GROUPS)
    place = sample.to(tl.int64) * norm_groups + norm_group
    owned = (tl.arange(0, BLOCK_GROUPS) < span // per_group) & (norm_group < norm_groups)
    tl.store(mean + place, group_mean, mask=owned)
    tl.store(rstd + place, group_rstd, mask=owned)

    gain, offset, factor, addend = _affine_rows(
        weight, bias, scale, shift, expert, sample, first + column, channels, live
    )
    center = _of_channels(group_mean, member)[None, :]
    inverse = _of_channels(group_rstd, member)[None, :]
    for pixel in range(0, pixels, BLOCK_PIXELS):
        mask = (row < pixels - pixel)[:, None] & inside[None, :]
        at = start + pixel * stride
        value = tl.load(x + at + tile, mask=mask, other=0.0).to(tl.float32)
        value = (value - center) * inverse * gain[None, :] + offset[None, :]
        value = value * factor[None, :] + addend[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        value = tl.where(live[None, :], value, 0.0)
        tl.store(y + at + tile, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _upstream(dy, value, center, inverse, gain, offset, factor, addend, live, SILU: tl.constexpr):
    """[BP, BC]: the gradient in front of the activation, and the normalised input; zeros where dead."""
    normal = tl.where(live[None, :], (value - center) * inverse, 0.0)
    grad = tl.where(live[None, :], dy, 0.0)
    if SILU:
        before = (normal * gain[None, :] + offset[None, :]) * factor[None, :] + addend[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-before))
        grad = grad * sigmoid * (1.0 + before * (1.0 - sigmoid))
    return grad, normal


@triton.jit(do_not_specialize=_INTEGERS)
def _backward(
    dy,  # (B, pixels, C)
    x,  # (B, pixels, C)
    weight,  # (E, C)
    bias,  # (E, C)
    scale,  # (B, C) or None
    shift,  # (B, C) or None
    mean,  # (B, norm groups) fp32
    rstd,  # (B, norm groups) fp32
    dx,  # (B, pixels, C) or None
    dscale,  # (B, C) or None
    dshift,  # (B, C) or None
    dweight,  # (B, C) fp32, each sample's share, or None
    dbias,  # (B, C) fp32, each sample's share, or None
    offsets,
    weight_index,
    widths,
    channels,
    pixels,
    per_group,
    span,
    norm_groups,
    num_groups,
    num_experts,
    SILU: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    sample = tl.program_id(0)
    group = group_of_sample(offsets, sample, num_groups, GROUPS)
    expert = expert_of(weight_index, group, num_experts)
    first, column, inside, member = _block(span, per_group, channels, VECTOR, BLOCK_GROUPS, BLOCK_CHANNELS)
    live = inside & (first + column < live_width(widths, group, channels))
    row = tl.arange(0, BLOCK_PIXELS)
    stride = (channels // VECTOR) * VECTOR
    start = sample.to(tl.int64) * pixels * stride + first
    tile = row[:, None] * stride + column[None, :]  # [BP, BC]
    gain, offset, factor, addend = _affine_rows(
        weight, bias, scale, shift, expert, sample, first + column, channels, live
    )
    place = sample.to(tl.int64) * norm_groups + (first + column) // per_group
    center = tl.load(mean + place, mask=live, other=0.0)[None, :]
    inverse = tl.load(rstd + place, mask=live, other=0.0)[None, :]

    grads = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    products = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for pixel in range(0, pixels, BLOCK_PIXELS):
        mask = (row < pixels - pixel)[:, None] & inside[None, :]
        at = start + pixel * stride
        above = tl.load(dy + at + tile, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + at + tile, mask=mask, other=0.0).to(tl.float32)
        grad, normal = _upstream(above, value, center, inverse, gain, offset, factor, addend, live, SILU)
        grads += grad
        products += grad * normal
    sum_grad = tl.sum(grads, 0)  # [BC]
    sum_product = tl.sum(products, 0)

    place = sample.to(tl.int64) * channels + first + column
    if dscale is not None:
        sum_affine = sum_product * gain + sum_grad * offset
        tl.store(dscale + place, sum_affine.to(dscale.dtype.element_ty), mask=inside)
    if dshift is not None:
        tl.store(dshift + place, sum_grad.to(dshift.dtype.element_ty), mask=inside)
    if dweight is not None:
        tl.store(dweight + place, sum_product * factor, mask=inside)
    if dbias is not None:
        tl.store(dbias + place, sum_grad * factor, mask=inside)
    if dx is None:
        return

    slope = gain * factor  # of the normalised input, in front of the activation
    elements = per_group * pixels.to(tl.float32)
    mean_grad = _of_channels(_group_sums(sum_grad * slope, member) / elements, member)[None, :]
    mean_product = _of_channels(_group_sums(sum_product * slope, member) / elements, member)[None, :]
    for pixel in range(0, pixels, BLOCK_PIXELS):
        mask = (row < pixels - pixel)[:, None] & inside[None, :]
        at = start + pixel * stride
        above = tl.load(dy + at + tile, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + at + tile, mask=mask, other=0.0).to(tl.float32)
        grad, normal = _upstream(above, value, center, inverse, gain, offset, factor, addend, live, SILU)
        value = inverse * (grad * slope[None, :] - mean_grad - normal * mean_product)
        value = tl.where(live[None, :], value, 0.0)
        tl.store(dx + at + tile, value.to(dx.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class NormTile:
    """What one program owns: `span` channels (whole norm groups), walked in tiles of block_pixels x block_channels."""

    span: int
    vector: int
    block_groups: int
    block_channels: int
    block_pixels: int
    num_warps: int


def norm_tile(channels: int, per_group: int, pixels: int, itemsize: int) -> NormTile:
    """The narrowest block of whole norm groups whose rows are 64 contiguous bytes, so that small batches still fill a
    device. A tile holds 16 elements per thread: the backward keeps four such arrays in registers.
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
    num_warps = min(16, max(4, block_channels // 128))  # a thread keeps at least ten rows of channels, too
    return NormTile(span, vector, triton.next_power_of_2(groups), block_channels, block_pixels, num_warps)


def norm_supported(problem: Any) -> str | None:
    """None, or why these kernels cannot serve the problem."""
    if problem.channels_per_group > MAX_CHANNELS_PER_GROUP:
        return f"it has norm groups of at most {MAX_CHANNELS_PER_GROUP} channels, not {problem.channels_per_group}"
    if problem.height * problem.width * problem.channels >= 2**31:
        return "a sample must have fewer than 2**31 elements"
    return None


def _launch_settings(p: Any, itemsize: int) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Grid, integer arguments and constants of a launch."""
    per_group, pixels = p.channels // p.num_norm_groups, p.height * p.width
    tile = norm_tile(p.channels, per_group, pixels, itemsize)
    grid = (p.batch, triton.cdiv(p.channels, tile.span))
    integers = (p.channels, pixels, per_group, tile.span, p.num_norm_groups, p.num_groups, p.num_experts)
    constants = {
        "SILU": p.silu,
        "VECTOR": tile.vector,
        "GROUPS": triton.next_power_of_2(p.num_groups),
        "BLOCK_GROUPS": tile.block_groups,
        "BLOCK_CHANNELS": tile.block_channels,
        "BLOCK_PIXELS": tile.block_pixels,
        "num_warps": tile.num_warps,
    }
    return grid, integers, constants


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
    """Returns y (B, C, H, W) channels_last, mean and rstd (B, norm groups) fp32.

    p: a NormProblem of at least one sample. x: channels_last; everything else dense, of the dtype of x or int32.
    """
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    grid, integers, constants = _launch_settings(p, x.element_size())
    _forward[grid](
        x, weight, bias, scale, shift, y, mean, rstd, offsets, weight_index, widths, *integers, p.eps, **constants
    )
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
) -> tuple[Tensor | None, ...]:
    """Returns dx (B, C, H, W) channels_last, dweight and dbias (E, C), dscale and dshift (B, C); None where not in mask.

    Preconditions as for the forward. dweight and dbias go through fp32 shares per sample and a second launch.
    """
    dx = torch.empty_like(x, memory_format=torch.channels_last) if mask[0] else None
    per_sample = [x.new_empty((p.batch, p.channels)) if wanted else None for wanted in mask[3:]]
    shares = [x.new_empty((p.batch, p.channels), dtype=torch.float32) if wanted else None for wanted in mask[1:3]]
    grid, integers, constants = _launch_settings(p, x.element_size())
    _backward[grid](
        dy, x, weight, bias, scale, shift, mean, rstd, dx, *per_sample, *shares,
        offsets, weight_index, widths, *integers, **constants,
    )  # fmt: skip
    grads = [None if share is None else torch.empty_like(weight) for share in shares]
    wanted_shares = tuple(share for share in shares if share is not None)
    if wanted_shares:
        wanted = tuple(grad for grad in grads if grad is not None)
        sum_per_expert(wanted_shares, wanted, offsets, weight_index)
    return dx, *grads, *per_sample
