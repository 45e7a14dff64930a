"""Routed convolution through pointers: forward and dgrad on any GPU, for any channels and any image.

A program computes a tile of BM pixels x BN channels, accumulated transposed, acc[BN, BM] = weights @ pixels^T, like the
TMA kernel, whose epilogue it shares:

    program -> (channel tile, chunk of pixels, row of the tile table) and, in dgrad with a stride, a class of pixels
    loop over taps and blocks of BK source channels: two loads, one product; then one masked block for a tail past which
    there are other values than zeros

"Source" is x in forward and dy in dgrad; "out" is y and dx. Of two inputs, the forward walks one after the other, and
dgrad writes each its channels. Loads of the main loop have no mask along the channels, so
that they stay 16 bytes wide for any width; only such a tail masks channels past the width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tdc_fast.kernels.common import (
    Addends,
    Output,
    Samples,
    axis_taps,
    expert_of,
    finish_tile,
    live_width,
    load_tile_row,
    multiply,
)


class Source(NamedTuple):
    """A tensor whose channels are multiplied: all of them, or those of one of two inputs."""

    pointer: Any  # of the tile's first sample, or None
    height: Any
    width: Any
    channels: Any
    first: Any  # channel of the weights that meets its first
    weight_channels: Any


class Pixels(NamedTuple):
    """The pixels of a tile, [BM] each."""

    sample: Any  # within the tile
    row: Any  # offset of the source pixel at the first tap
    y: Any  # its coordinates
    x: Any
    out: Any  # pixel of the output image
    valid: Any


class PointerForm(NamedTuple):
    """Compile-time constants; the kernel's arguments of the same names explain them."""

    S: Any
    STRIDE_H: Any
    STRIDE_W: Any
    DGRAD: Any
    FILLED: Any
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
        channels = source.weight_channels
        offsets = columns[:, None] * (filter_taps * channels) + tap * channels + source.first + steps[None, :]
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
def _accumulate(
    acc,  # [BN, BM]
    source,
    weight,  # of the expert
    filter_taps,
    out_channels,
    live,  # channels of the source
    pixels,
    columns,  # [BN]
    taps_h,
    taps_w,
    FORM: tl.constexpr,
):
    """Multiplies all live channels of one source."""
    taps = taps_h.count * taps_w.count
    across = tl.maximum(taps_w.count, 1)  # pipelining divides before it knows that there is a tap
    blocks = tl.cdiv(live, FORM.BK) if FORM.FILLED else live // FORM.BK
    for outer in range(blocks if FORM.TAPS_INNER else taps):
        for inner in range(taps if FORM.TAPS_INNER else blocks):
            tap = inner if FORM.TAPS_INNER else outer
            k = (outer if FORM.TAPS_INNER else inner) * FORM.BK
            acc = _step(
                acc, source, weight, filter_taps, out_channels, live, pixels, columns, taps_h, taps_w,
                tap // across, tap % across, k, FORM, False,
            )  # fmt: skip
    if FORM.TAIL:
        for tap in range(tl.where(blocks * FORM.BK < live, taps, 0)):
            acc = _step(
                acc, source, weight, filter_taps, out_channels, live, pixels, columns, taps_h, taps_w,
                tap // across, tap % across, blocks * FORM.BK, FORM, True,
            )  # fmt: skip
    return acc


@triton.jit
def _tile(
    source,
    source2,
    weight,  # of the expert
    filter_taps,
    output,
    addends,
    samples,
    pixels,
    pixels2,  # as in source2
    columns,  # [BN]
    taps_h,
    taps_w,
    FORM: tl.constexpr,
):
    """Computes these columns of the result."""
    acc = tl.zeros([columns.shape[0], pixels.sample.shape[0]], tl.float32)
    live = samples.live if source2.pointer is None else tl.minimum(samples.live, source2.first)
    acc = _accumulate(
        acc, source, weight, filter_taps, output.channels, live, pixels, columns, taps_h, taps_w, FORM
    )  # fmt: skip
    if source2.pointer is not None:
        live = tl.maximum(samples.live - source2.first, 0)
        acc = _accumulate(
            acc, source2, weight, filter_taps, output.channels, live, pixels2, columns, taps_h, taps_w, FORM
        )  # fmt: skip
    finish_tile(acc, output, addends, samples, pixels.sample, pixels.out, pixels.valid, columns)


_GEOMETRY = [
    "source_height", "source_width", "out_height", "out_width", "grid_height", "grid_width", "chunks",
    "pad_height", "pad_width", "num_experts", "tile_row", "R",
]  # fmt: skip


@triton.jit(do_not_specialize=_GEOMETRY)
def conv_pointer_kernel(
    source,  # (B, source_height, source_width, source_channels), with source2 less x2_channels
    source2,  # (B, source_height, source_width, x2_channels): the last source channels, or None
    weight,  # (E, C_out, R, S, C_in)
    bias,  # (E, C_out) or None
    sample_bias,  # (B, C_out) or None
    residual,  # like out, or None
    out,  # (B, out_height, out_width, out_channels), with out2 less x2_channels
    out2,  # (B, out_height, out_width, x2_channels): the last channels of the result, or None
    tiles,
    weight_index,
    source_widths,  # (N,) or None
    out_widths,  # (N,) or None
    source_channels,
    out_channels,
    x2_channels,
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
    FILLED: tl.constexpr,  # blocks hold zeros past the live source channels
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
    own = source_channels if source2 is None else source_channels - x2_channels
    begin = first.to(tl.int64) * (source_height * source_width)
    pointer2 = None if source2 is None else source2 + begin * x2_channels
    row = (sample * source_height + y) * source_width + x
    place = out_y * out_width + out_x

    pixels = Pixels(sample=sample, row=row * own, y=y, x=x, out=place, valid=valid)
    pixels2 = Pixels(sample=sample, row=row * x2_channels, y=y, x=x, out=place, valid=valid)
    image = Source(
        pointer=source + begin * own, height=source_height, width=source_width, channels=own, first=0,
        weight_channels=source_channels,
    )  # fmt: skip
    image2 = Source(
        pointer=pointer2, height=source_height, width=source_width, channels=x2_channels, first=own,
        weight_channels=source_channels,
    )  # fmt: skip
    output = Output(
        pointer=out, pointer2=out2, pixels=out_height * out_width, channels=out_channels,
        seam=out_channels - x2_channels,
    )  # fmt: skip
    addends = Addends(bias=bias, sample_bias=sample_bias, residual=residual)
    samples = Samples(expert=expert, first=first, count=count, live=live, out_live=out_live)
    FORM: tl.constexpr = PointerForm(
        S=S, STRIDE_H=STRIDE_H, STRIDE_W=STRIDE_W, DGRAD=DGRAD, FILLED=FILLED, TAPS_INNER=TAPS_INNER, TAIL=TAIL,
        PRECISION=PRECISION, BK=BK,
    )  # fmt: skip
    if NARROW and out_live - column <= BN // 2:
        half = column + tl.arange(0, BN // 2)
        _tile(image, image2, weight, R * S, output, addends, samples, pixels, pixels2, half, taps_h, taps_w, FORM)
        zeros, nothing = tl.zeros([BN // 2, BM], tl.float32), Addends(bias=None, sample_bias=None, residual=None)
        finish_tile(zeros, output, nothing, samples, sample, pixels.out, valid, half + BN // 2)
    else:
        columns = column + tl.arange(0, BN)
        _tile(image, image2, weight, R * S, output, addends, samples, pixels, pixels2, columns, taps_h, taps_w, FORM)
