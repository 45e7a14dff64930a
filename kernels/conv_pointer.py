"""Routed convolution through pointers: forward and dgrad on any GPU, for any channels and any image.

A program computes a tile of BM pixels x BN channels, accumulated transposed, acc[BN, BM] = weights @ pixels^T, so that
the tile and the epilogue are those of the TMA kernel:

    program -> (channel tile, chunk of pixels, row of the tile table) and, in dgrad with a stride, a class of pixels
    loop over taps and blocks of BK source channels: two loads, one product; then one masked block for the tail

"Source" is x in forward and dy in dgrad; "out" is y and dx. Loads of the main loop carry no mask along the channels, so
that they stay 16 bytes wide whatever the width is; channels past the width are masked in the tail alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tdc_fast.kernels.common import axis_taps, expert_of, finish_tile, live_width, load_tile_row, multiply


@triton.jit
def _step(
    acc,
    source,
    weight,
    tap_h,
    tap_w,
    k,
    row,  # [BM] offset of a pixel's source at tap (0, 0)
    y,  # [BM] its coordinates there
    x,
    valid,
    columns,
    live,
    source_height,
    source_width,
    source_channels,
    out_channels,
    first_h,
    first_w,
    taps,  # of the filter
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of BK source channels at one tap."""
    k_axis: tl.constexpr = 1 if DGRAD else 0
    steps = k + tl.arange(0, BK)
    if DGRAD:
        y, x, shift = y - tap_h, x - tap_w, -(tap_h * source_width + tap_w)
        tap = (first_h + tap_h * STRIDE_H) * S + first_w + tap_w * STRIDE_W
        offsets = steps[:, None] * (taps * out_channels) + tap * out_channels + columns[None, :]  # [BK, BN]
        inside = (columns < out_channels)[None, :]
    else:
        y, x, shift = y + tap_h, x + tap_w, tap_h * source_width + tap_w
        tap = tap_h * S + tap_w
        offsets = columns[:, None] * (taps * source_channels) + tap * source_channels + steps[None, :]  # [BN, BK]
        inside = (columns < out_channels)[:, None]
    reach = valid & (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
    pixels = source + (row + shift * source_channels)[:, None] + steps[None, :]  # [BM, BK]
    if MASKED:
        there = steps < source_channels
        alive = steps < live
        a = tl.load(weight + offsets, mask=inside & tl.expand_dims(there, k_axis), other=0.0)
        b = tl.load(pixels, mask=reach[:, None] & there[None, :], other=0.0)
        # Chosen after the load: a mask of no known alignment would make it a load of single elements.
        a = tl.where(tl.expand_dims(alive, k_axis), a, 0.0)
        b = tl.where(alive[None, :], b, 0.0)
    else:
        a = tl.load(weight + offsets, mask=inside, other=0.0)
        b = tl.load(pixels, mask=reach[:, None], other=0.0)
    if DGRAD:
        a = tl.trans(a)
    return multiply(a, tl.trans(b), acc, PRECISION)


@triton.jit
def _tile(
    source,
    weight,  # of the expert
    out,
    bias,
    sample_bias,
    residual,
    expert,
    first,
    sample,  # [BM]
    row,  # [BM]
    y,  # [BM]
    x,
    pixel,  # [BM] of out
    valid,
    columns,
    live,
    out_live,
    source_height,
    source_width,
    source_channels,
    out_channels,
    out_pixels,
    first_h,
    first_w,
    taps_h,
    taps_w,
    taps,  # of the filter
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """These columns of the result."""
    acc = tl.zeros([columns.shape[0], sample.shape[0]], tl.float32)
    reaching = taps_h * taps_w
    across = tl.maximum(taps_w, 1)  # pipelining divides before it knows that there is a tap
    blocks = live // BK
    for outer in range(blocks if TAPS_INNER else reaching):
        for inner in range(reaching if TAPS_INNER else blocks):
            tap = inner if TAPS_INNER else outer
            k = (outer if TAPS_INNER else inner) * BK
            acc = _step(
                acc, source, weight, tap // across, tap % across, k, row, y, x, valid, columns, live, source_height,
                source_width, source_channels, out_channels, first_h, first_w, taps, S, STRIDE_H, STRIDE_W, DGRAD, BK,
                PRECISION, False,
            )  # fmt: skip
    if TAIL:
        for tap in range(tl.where(blocks * BK < live, reaching, 0)):
            acc = _step(
                acc, source, weight, tap // across, tap % across, blocks * BK, row, y, x, valid, columns, live,
                source_height, source_width, source_channels, out_channels, first_h, first_w, taps, S, STRIDE_H,
                STRIDE_W, DGRAD, BK, PRECISION, True,
            )  # fmt: skip
    finish_tile(
        acc, out, bias, sample_bias, residual, expert, first, sample, pixel, valid, columns, out_live, out_channels,
        out_pixels,
    )  # fmt: skip


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
    grid_height,  # pixels that one class of programs serves: of out, or of every STRIDE-th pixel of it
    grid_width,
    chunks,
    pad_height,
    pad_width,
    num_experts,
    tile_row,  # where the table's level begins
    R,  # not a constant: a loop over a known number of taps is unrolled, which takes twice the registers
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    TAIL: tl.constexpr,
    NARROW: tl.constexpr,  # a tile whose second half is dead is half a tile
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    channel_tiles = tl.cdiv(out_channels, BN)
    program = tl.program_id(0)
    channel_tile = program % channel_tiles
    chunk = (program // channel_tiles) % chunks
    group, first, count = load_tile_row(tiles, tile_row + program // channel_tiles // chunks)
    if group < 0:
        return
    pixel_class = tl.num_programs(1) - 1 - tl.program_id(1)
    taps_h, first_h, base_h = axis_taps(pixel_class // STRIDE_W, pad_height, R, STRIDE_H, DGRAD)
    taps_w, first_w, base_w = axis_taps(pixel_class % STRIDE_W, pad_width, S, STRIDE_W, DGRAD)

    flat = chunk * BM + tl.arange(0, BM)
    pixels = grid_height * grid_width
    sample = flat // pixels
    grid_y = flat % pixels // grid_width
    grid_x = flat % pixels % grid_width
    if DGRAD:
        y, x = grid_y + base_h, grid_x + base_w
        out_y, out_x = grid_y * STRIDE_H + pixel_class // STRIDE_W, grid_x * STRIDE_W + pixel_class % STRIDE_W
    else:
        y, x = grid_y * STRIDE_H + base_h, grid_x * STRIDE_W + base_w
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
    pixel = out_y * out_width + out_x
    out_pixels = out_height * out_width

    if NARROW and out_live - column <= BN // 2:
        half = column + tl.arange(0, BN // 2)
        _tile(
            source, weight, out, bias, sample_bias, residual, expert, first, sample, row, y, x, pixel, valid, half,
            live, out_live, source_height, source_width, source_channels, out_channels, out_pixels, first_h, first_w,
            taps_h, taps_w, R * S, S, STRIDE_H, STRIDE_W, DGRAD, TAPS_INNER, TAIL, PRECISION, BK,
        )  # fmt: skip
        finish_tile(
            tl.zeros([BN // 2, BM], tl.float32), out, None, None, None, expert, first, sample, pixel, valid,
            half + BN // 2, out_live, out_channels, out_pixels,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, BN)
        _tile(
            source, weight, out, bias, sample_bias, residual, expert, first, sample, row, y, x, pixel, valid, columns,
            live, out_live, source_height, source_width, source_channels, out_channels, out_pixels, first_h, first_w,
            taps_h, taps_w, R * S, S, STRIDE_H, STRIDE_W, DGRAD, TAPS_INNER, TAIL, PRECISION, BK,
        )  # fmt: skip
