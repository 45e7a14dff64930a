"""Routed convolution through pointers: forward and dgrad on any GPU, for any channels and any image.

A program computes a tile of BM pixels x BN channels, accumulated transposed, acc[BN, BM] = weights @ pixels^T, like the
TMA kernel, whose epilogue it shares:

    program -> (channel tile, chunk of pixels, row of the tile table) and, in dgrad with a stride, a class of pixels
    loop over taps and blocks of BK source channels: two loads, one product; then one masked block for the tail

"Source" is x in forward and dy in dgrad; "out" is y and dx. Loads of the main loop have no mask along the channels, so
that they stay 16 bytes wide for any width; only the tail masks channels past the width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tdc_fast.kernels.common import (
    Addends,
    Image,
    Output,
    Samples,
    axis_taps,
    expert_of,
    finish_tile,
    live_width,
    load_tile_row,
    multiply,
)


class Pixels(NamedTuple):
    """The pixels of a tile, [BM] each."""

    sample: Any  # within the tile
    row: Any  # offset of the source pixel at the first tap
    y: Any  # its coordinates
    x: Any
    out: Any  # pixel of the output image
    valid: Any


class Form(NamedTuple):
    """Compile-time constants; the kernel's arguments of the same names explain them."""

    S: Any
    STRIDE_H: Any
    STRIDE_W: Any
    DGRAD: Any
    TAPS_INNER: Any
    TAIL: Any
    PRECISION: Any
    BK: Any


@triton.jit
def _step(
    acc,  # [BN, BM]
    source,
    weight,  # of the expert
    filter_taps,
    out_channels,
    live,
    pixels,
    columns,  # [BN]
    taps_h,
    taps_w,
    tap_h,
    tap_w,
    k,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Multiplies one block of BK source channels at one tap."""
    k_axis: tl.constexpr = 1 if FORM.DGRAD else 0
    steps = k + tl.arange(0, FORM.BK)
    if FORM.DGRAD:
        y, x, shift = pixels.y - tap_h, pixels.x - tap_w, -(tap_h * source.width + tap_w)
        tap = (taps_h.first + tap_h * FORM.STRIDE_H) * FORM.S + taps_w.first + tap_w * FORM.STRIDE_W
        offsets = steps[:, None] * (filter_taps * out_channels) + tap * out_channels + columns[None, :]  # [BK, BN]
        inside = (columns < out_channels)[None, :]
    else:
        y, x, shift = pixels.y + tap_h, pixels.x + tap_w, tap_h * source.width + tap_w
        tap = tap_h * FORM.S + tap_w
        offsets = columns[:, None] * (filter_taps * source.channels) + tap * source.channels + steps[None, :]
        inside = (columns < out_channels)[:, None]
    reach = pixels.valid & (y >= 0) & (y < source.height) & (x >= 0) & (x < source.width)
    values = source.pointer + (pixels.row + shift * source.channels)[:, None] + steps[None, :]  # [BM, BK]
    if MASKED:
        there = steps < source.channels
        alive = steps < live
        a = tl.load(weight + offsets, mask=inside & tl.expand_dims(there, k_axis), other=0.0)
        b = tl.load(values, mask=reach[:, None] & there[None, :], other=0.0)
        # Selected after the load: a mask of unknown alignment would make it a load of single elements.
        a = tl.where(tl.expand_dims(alive, k_axis), a, 0.0)
        b = tl.where(alive[None, :], b, 0.0)
    else:
        a = tl.load(weight + offsets, mask=inside, other=0.0)
        b = tl.load(values, mask=reach[:, None], other=0.0)
    if FORM.DGRAD:
        a = tl.trans(a)
    return multiply(a, tl.trans(b), acc, FORM.PRECISION)


@triton.jit
def _tile(
    source,
    weight,  # of the expert
    filter_taps,
    output,
    addends,
    samples,
    pixels,
    columns,  # [BN]
    taps_h,
    taps_w,
    FORM: tl.constexpr,
):
    """Computes these columns of the result."""
    acc = tl.zeros([columns.shape[0], pixels.sample.shape[0]], tl.float32)
    taps = taps_h.count * taps_w.count
    across = tl.maximum(taps_w.count, 1)  # pipelining divides before it knows that there is a tap
    blocks = samples.live // FORM.BK
    for outer in range(blocks if FORM.TAPS_INNER else taps):
        for inner in range(taps if FORM.TAPS_INNER else blocks):
            tap = inner if FORM.TAPS_INNER else outer
            k = (outer if FORM.TAPS_INNER else inner) * FORM.BK
            acc = _step(
                acc, source, weight, filter_taps, output.channels, samples.live, pixels, columns, taps_h, taps_w,
                tap // across, tap % across, k, FORM, False,
            )  # fmt: skip
    if FORM.TAIL:
        for tap in range(tl.where(blocks * FORM.BK < samples.live, taps, 0)):
            acc = _step(
                acc, source, weight, filter_taps, output.channels, samples.live, pixels, columns, taps_h, taps_w,
                tap // across, tap % across, blocks * FORM.BK, FORM, True,
            )  # fmt: skip
    finish_tile(acc, output, addends, samples, pixels.sample, pixels.out, pixels.valid, columns)


_GEOMETRY = [
    "source_height", "source_width", "out_height", "out_width", "grid_height", "grid_width", "chunks",
    "pad_height", "pad_width", "num_experts", "tile_row", "R",
]  # fmt: skip


@triton.jit(do_not_specialize=_GEOMETRY)
def conv_pointer_kernel(
    source,  # (B, source_height, source_width, source_channels)
    weight,  # (E, C_out, R, S, C_in)
    bias,  # (E, C_out) or None
    sample_bias,  # (B, C_out) or None
    residual,  # like out, or None
    out,  # (B, out_height, out_width, out_channels)
    tiles,
    weight_index,
    source_widths,  # (N,) or None
    out_widths,  # (N,) or None
    source_channels,
    out_channels,
    source_height,
    source_width,
    out_height,
    out_width,
    grid_height,  # of the pixels that the programs of one class compute: all of out, or every STRIDE-th one
    grid_width,
    chunks,
    pad_height,
    pad_width,
    num_experts,
    tile_row,  # first row of the table's level
    R,  # not a constant: with a constant number of taps the loop is unrolled, which takes twice the registers
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    TAIL: tl.constexpr,
    NARROW: tl.constexpr,  # where the second half of a tile's channels is dead, only the first is computed
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Computes one tile: program (row of the table, chunk of pixels, channel tile), class of pixels."""
    channel_tiles = tl.cdiv(out_channels, BN)
    program = tl.program_id(0)
    channel_tile = program % channel_tiles
    chunk = (program // channel_tiles) % chunks
    group, first, count = load_tile_row(tiles, tile_row + program // channel_tiles // chunks)
    if group < 0:
        return
    pixel_class = tl.num_programs(1) - 1 - tl.program_id(1)
    taps_h = axis_taps(pixel_class // STRIDE_W, pad_height, R, STRIDE_H, DGRAD)
    taps_w = axis_taps(pixel_class % STRIDE_W, pad_width, S, STRIDE_W, DGRAD)

    flat = chunk * BM + tl.arange(0, BM)
    grid_pixels = grid_height * grid_width
    sample = flat // grid_pixels
    grid_y = flat % grid_pixels // grid_width
    grid_x = flat % grid_pixels % grid_width
    if DGRAD:
        y, x = grid_y + taps_h.base, grid_x + taps_w.base
        out_y, out_x = grid_y * STRIDE_H + pixel_class // STRIDE_W, grid_x * STRIDE_W + pixel_class % STRIDE_W
    else:
        y, x = grid_y * STRIDE_H + taps_h.base, grid_x * STRIDE_W + taps_w.base
        out_y, out_x = grid_y, grid_x
    valid = (sample < count) & (out_y < out_height) & (out_x < out_width)

    column = channel_tile * BN
    out_live = live_width(out_widths, group, out_channels)
    live = live_width(source_widths, group, source_channels)
    live = tl.where(column < out_live, live, 0)  # a dead tile has no steps
    expert = expert_of(weight_index, group, num_experts)
    weight += expert.to(tl.int64) * (R * S * source_channels * out_channels)
    source += first.to(tl.int64) * (source_height * source_width * source_channels)
    row = ((sample * source_height + y) * source_width + x) * source_channels

    pixels = Pixels(sample=sample, row=row, y=y, x=x, out=out_y * out_width + out_x, valid=valid)
    image = Image(pointer=source, height=source_height, width=source_width, channels=source_channels)
    output = Output(pointer=out, pixels=out_height * out_width, channels=out_channels)
    addends = Addends(bias=bias, sample_bias=sample_bias, residual=residual)
    samples = Samples(expert=expert, first=first, count=count, live=live, out_live=out_live)
    FORM: tl.constexpr = Form(
        S=S, STRIDE_H=STRIDE_H, STRIDE_W=STRIDE_W, DGRAD=DGRAD, TAPS_INNER=TAPS_INNER, TAIL=TAIL, PRECISION=PRECISION,
        BK=BK,
    )  # fmt: skip
    if NARROW and out_live - column <= BN // 2:
        half = column + tl.arange(0, BN // 2)
        _tile(image, weight, R * S, output, addends, samples, pixels, half, taps_h, taps_w, FORM)
        zeros, nothing = tl.zeros([BN // 2, BM], tl.float32), Addends(bias=None, sample_bias=None, residual=None)
        finish_tile(zeros, output, nothing, samples, sample, pixels.out, valid, half + BN // 2)
    else:
        columns = column + tl.arange(0, BN)
        _tile(image, weight, R * S, output, addends, samples, pixels, columns, taps_h, taps_w, FORM)
