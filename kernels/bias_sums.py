"""Bias gradients of a routed convolution: sums of dy over the pixels of each expert's samples, and of each sample.

A program adds up a block of neighbouring channels over one of S equal shares of every group that uses its expert: of
the group's pixels, or of its samples where the sums of each of these are wanted too. Every element of a program's tile
keeps its own sum and the tile is added up by a tree at the end, so the order of the additions is fixed. With S = 1 the
sums are final, otherwise fp32 partials.

The programs are part of the weight gradient's launch (wgrad_kernels.py); `bias_launches` is for calls that want no
weight gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.common import live_width
from tdc_fast.kernels.expert_sums import my_groups, next_group, segment_of
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.split_sums import share_start, sum_splits_launch, widest_access

_MAX_CHANNELS = 32  # short programs: they come last in a launch
_TILE_ELEMENTS = 1024  # per warp: every thread has four loads of 16 bytes in flight, and registers suffice
_WARPS = 8
_MAX_SPLITS = 64


class Routing(NamedTuple):
    """The groups whose samples a program sums over."""

    offsets: Any
    in_widths: Any  # (N,) or None
    out_widths: Any  # (N,) or None
    number: Any  # [GROUPS]
    mine: Any  # [GROUPS] whether the group uses the program's expert
    batch: Any


class Sums(NamedTuple):
    """What bias gradients are summed from and where they go."""

    dy: Any  # (B, pixels, channels)
    out: Any  # (splits, E, channels), fp32 unless there is one split; or None
    sample_out: Any  # (B, channels), or None
    channels: Any
    pixels: Any


class SumForm(NamedTuple):
    """Compile-time constants: a tile is SAMPLES x PIXELS x CHANNELS; without sums of samples SAMPLES is 1."""

    GROUPS: Any
    SAMPLES: Any
    PIXELS: Any
    CHANNELS: Any


@triton.jit
def sum_biases(sums, routing, column, split, splits, slab, FORM: tl.constexpr):
    """Computes one block of channels, from `column` on. slab: (split, expert) as one index."""
    columns = column + tl.arange(0, FORM.CHANNELS)  # [BC]
    total = tl.zeros([FORM.CHANNELS], tl.float32)
    group = -1
    for _ in range(tl.sum(routing.mine.to(tl.int32), 0)):
        group = next_group(routing.number, routing.mine, group, FORM.GROUPS)
        first, past = segment_of(routing.offsets, group, routing.batch)
        live = live_width(routing.out_widths, group, sums.channels)
        if sums.sample_out is None:
            total += _sum_pixels(sums, first, past, live, column, split, splits, FORM)
        else:
            total += _sum_samples(sums, first, past, live, column, split, splits, FORM)
    if sums.out is not None:
        place = sums.out + slab * sums.channels + columns
        tl.store(place, total.to(sums.out.dtype.element_ty), mask=columns < sums.channels)


@triton.jit
def _sum_pixels(sums, first, past, live, column, split, splits, FORM: tl.constexpr):
    """Sums [BC] over a share of a group's pixels, 0 where dead."""
    PIXELS: tl.constexpr = FORM.PIXELS
    columns, near = column + tl.arange(0, FORM.CHANNELS), tl.arange(0, PIXELS)
    places = (near * sums.channels)[:, None] + columns[None, :]  # [BP, BC]
    pixels = (past - first) * sums.pixels
    steps = tl.where(column < live, tl.cdiv(pixels, PIXELS), 0)
    acc = tl.zeros([PIXELS, FORM.CHANNELS], tl.float32)
    for step in range(share_start(steps, split, splits), share_start(steps, split + 1, splits)):
        start = (first.to(tl.int64) * sums.pixels + step * PIXELS) * sums.channels
        # Masked by the number of channels, not of live ones, whose alignment is unknown: loads stay wide.
        mask = (near < pixels - step * PIXELS)[:, None] & (columns < sums.channels)[None, :]
        acc += tl.load(sums.dy + start + places, mask=mask, other=0.0).to(tl.float32)
    return tl.where(columns < live, tl.sum(acc, 0), 0.0)


@triton.jit
def _sum_samples(sums, first, past, live, column, split, splits, FORM: tl.constexpr):
    """Sums [BC] over a share of a group's samples, 0 where dead, and stores those of each sample."""
    SAMPLES: tl.constexpr = FORM.SAMPLES
    PIXELS: tl.constexpr = FORM.PIXELS
    columns, near, pixel = column + tl.arange(0, FORM.CHANNELS), tl.arange(0, SAMPLES), tl.arange(0, PIXELS)
    rows = near[:, None] * sums.pixels + pixel[None, :]
    places = rows[:, :, None] * sums.channels + columns[None, None, :]  # [BS, BP, BC]
    there = columns < sums.channels
    walked = tl.where(column < live, sums.pixels, 0)
    steps = tl.cdiv(past - first, SAMPLES)
    total = tl.zeros([FORM.CHANNELS], tl.float32)
    for step in range(share_start(steps, split, splits), share_start(steps, split + 1, splits)):
        sample = first + step * SAMPLES
        acc = tl.zeros([SAMPLES, PIXELS, FORM.CHANNELS], tl.float32)
        for begin in range(0, walked, PIXELS):
            start = (sample.to(tl.int64) * sums.pixels + begin) * sums.channels
            inside = (near < past - sample)[:, None] & (pixel < sums.pixels - begin)[None, :]
            mask = inside[:, :, None] & there[None, None, :]
            acc += tl.load(sums.dy + start + places, mask=mask, other=0.0).to(tl.float32)
        values = tl.where((columns < live)[None, :], tl.sum(acc, 1), 0.0)  # [BS, BC]
        place = (sample.to(tl.int64) + near)[:, None] * sums.channels + columns[None, :]
        stored = (near < past - sample)[:, None] & there[None, :]
        tl.store(sums.sample_out + place, values.to(sums.sample_out.dtype.element_ty), mask=stored)
        total += tl.sum(values, 0)
    return total


@triton.jit(do_not_specialize=("batch", "channels", "pixels", "num_groups", "num_experts", "splits"))
def bias_kernel(
    dy,  # (B, pixels, channels)
    out,  # (splits, E, channels), fp32 unless there is one split; or None
    sample_out,  # (B, channels), or None
    offsets,
    weight_index,
    out_widths,  # (N,) or None
    batch,
    channels,
    pixels,
    num_groups,
    num_experts,
    splits,
    VECTOR: tl.constexpr,  # divides channels: a masked load may access this many at once
    GROUPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Computes one block of channels: program (expert, block), split."""
    channels = (channels // VECTOR) * VECTOR
    blocks = tl.cdiv(channels, CHANNELS)
    expert, column, split = tl.program_id(0) // blocks, tl.program_id(0) % blocks * CHANNELS, tl.program_id(1)
    number, mine = my_groups(weight_index, expert, num_groups, num_experts, GROUPS)
    routing = Routing(offsets=offsets, in_widths=None, out_widths=out_widths, number=number, mine=mine, batch=batch)
    sums = Sums(dy=dy, out=out, sample_out=sample_out, channels=channels, pixels=pixels)
    FORM: tl.constexpr = SumForm(GROUPS=GROUPS, SAMPLES=SAMPLES, PIXELS=PIXELS, CHANNELS=CHANNELS)
    sum_biases(sums, routing, column, split, splits, split.to(tl.int64) * num_experts + expert, FORM)


@functools.lru_cache(maxsize=4096)
def sum_tile(p: ConvProblem, per_sample: bool, warps: int) -> tuple[int, int, int]:
    """(samples, pixels, channels) of the tile in which a program of some warps adds up.

    Args:
        p: the convolution.
        per_sample: whether the sums of each sample are wanted.
        warps: of a program.
    """
    channels = min(_MAX_CHANNELS, max(16, triton.next_power_of_2(p.out_channels)))
    rows, pixels = _TILE_ELEMENTS * warps // channels, p.out_height * p.out_width
    if not per_sample:
        return 1, rows, channels
    rows //= 2  # the other half of the registers holds addresses
    walked = min(rows, triton.next_power_of_2(pixels))
    return min(rows // walked, triton.next_power_of_2(p.batch)), walked, channels


def _splits(p: ConvProblem, tile: tuple[int, int, int]) -> int:
    """Enough splits for two waves of programs, each with at least one tile of an even group."""
    samples, pixels, channels = tile
    used = max(1, min(p.num_experts, p.num_groups, p.batch))
    wanted = 2 * tile_shapes.device_of(p.device).multiprocessors // (used * triton.cdiv(p.out_channels, channels))
    steps = p.batch * p.out_height * p.out_width // (used * samples * pixels)
    return max(1, min(wanted, steps, _MAX_SPLITS))


def bias_launches(
    p: ConvProblem, dy: Tensor, t: ConvTensors, dbias: Tensor | None, dsample_bias: Tensor | None
) -> list[Launch]:
    """The launches that compute bias gradients, summed in fp32, without the weight gradient.

    Args:
        p: It has at least one sample.
        dy: (B, C_out, OH, OW) in channels_last memory.
        t: Only offsets, weight_index and out_widths are used, all contiguous.
        dbias: (E, C_out), written, or None.
        dsample_bias: (B, C_out), written, or None; dead channels are exact zeros.
    """
    tile = sum_tile(p, dsample_bias is not None, _WARPS)
    splits = _splits(p, tile)
    out = dbias
    if dbias is not None and splits > 1:
        out = torch.empty((splits, *dbias.shape), dtype=torch.float32, device=dbias.device)
    tensors = {
        "dy": dy,
        "out": out,
        "sample_out": dsample_bias,
        "offsets": t.offsets,
        "weight_index": t.weight_index,
        "out_widths": t.out_widths,
    }
    constants = {
        "batch": p.batch,
        "channels": p.out_channels,
        "pixels": p.out_height * p.out_width,
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
        "splits": splits,
        "VECTOR": widest_access(p.out_channels, p.dtype.itemsize),
        "GROUPS": triton.next_power_of_2(p.num_groups),
        "SAMPLES": tile[0],
        "PIXELS": tile[1],
        "CHANNELS": tile[2],
    }
    grid = (p.num_experts * triton.cdiv(p.out_channels, tile[2]), splits)
    launches = [Launch(bias_kernel, grid, tensors, constants, {"num_warps": _WARPS}, key=(p, tile))]
    if out is not None and dbias is not None and out is not dbias:
        launches.append(sum_splits_launch([out], [dbias], key=(p, "biases")))
    return launches
