"""Routed convolution through tensor descriptors: forward and dgrad on sm_90 and later, bf16 and fp16.

The tile is a box of NB samples x TH rows x TW columns of the source, loaded as one box [NB, TH, TW, BK] per tap and
block of BK channels. The copy engine fills what lies outside the image with zeros: that is the padding.

    acc[BN, BM] += weights[BN, BK] @ box[BM, BK]^T

The operands are in this order so that wgmma reads both from shared memory, where the copies put them: the left operand
of tl.dot loses that form when a 4-D box is reshaped, the right one keeps it. Stride 2 loads every other pixel through
the view [B, H/2, 2, W/2, 2 C] (HALVED). A box may straddle the end of its group: the rows of other samples are computed
and dropped, since rows do not mix.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels.common import axis_taps, expert_of, finish_tile, halves, live_width, load_tile_row, multiply


def source_descriptor(source: Tensor, constants: dict[str, Any]) -> TensorDescriptor:
    """The boxes of x or dy, (B, C, H, W) in channels_last memory."""
    batch, channels, height, width = source.shape
    nb, th, tw, bk = (constants[name] for name in ("NB", "TH", "TW", "BK"))
    image, row = height * width * channels, width * channels
    if constants["HALVED"]:
        shape = [batch, height // 2, 2, width // 2, 2 * channels]
        return TensorDescriptor(source, shape, [image, 2 * row, row, 2 * channels, 1], [nb, th, 1, tw, bk])
    return TensorDescriptor(source, [batch, height, width, channels], [image, row, channels, 1], [nb, th, tw, bk])


def weight_descriptor(weight: Tensor, constants: dict[str, Any], channels: int) -> TensorDescriptor:
    """Boxes of so many output channels of weight (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in, seen as a
    matrix (E C_out, R S C_in).

    Two dimensions, not four: a reshape would cost the left operand its place in shared memory.
    """
    experts, c_out, c_in, rows, columns = weight.shape
    bk = constants["BK"]
    length = rows * columns * c_in
    block = [bk, channels] if constants["DGRAD"] else [channels, bk]
    return TensorDescriptor(weight, [experts * c_out, length], [length, 1], block)


@triton.jit
def _step(
    acc,
    source,
    weight,
    tap_h,
    tap_w,
    k,
    first,
    y,  # source coordinates of the box at tap (0, 0)
    x,
    weight_row,
    column,
    live,
    source_channels,
    out_channels,
    first_h,
    first_w,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    HALVED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One box at one tap."""
    if DGRAD:
        tap = (first_h + tap_h * STRIDE_H) * S + first_w + tap_w * STRIDE_W
        box = source.load([first, y - tap_h, x - tap_w, k])
        a = weight.load([weight_row + k, tap * out_channels + column])
    else:
        tap = tap_h * S + tap_w
        if HALVED:
            # Coordinates may be -1: shifts and masks round them down, where a division would round up.
            row, col = y + tap_h, x + tap_w
            box = source.load([first, row >> 1, row & 1, col >> 1, (col & 1) * source_channels + k])
        else:
            box = source.load([first, y + tap_h, x + tap_w, k])
        a = weight.load([weight_row, tap * source_channels + k])
    b = box.reshape(BM, BK)
    if MASKED:
        alive = k + tl.arange(0, BK) < live
        a = tl.where(alive[:, None] if DGRAD else alive[None, :], a, 0.0)
        b = tl.where(alive[None, :], b, 0.0)
    if DGRAD:
        a = tl.trans(a)
    return multiply(a, tl.trans(b), acc, "ieee")


@triton.jit
def _finish(
    acc,  # [BN, ROWS]
    out,
    bias,
    sample_bias,
    residual,
    expert,
    first,
    count,
    begin,  # of these rows within the box
    box_y,
    box_x,
    parity_h,
    parity_w,
    column,
    out_live,
    out_channels,
    out_height,
    out_width,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    """Stores rows of the box to the pixels they stand for."""
    place = begin + tl.arange(0, ROWS)
    sample = place // (TH * TW)
    y = box_y + place // TW % TH
    x = box_x + place % TW
    if DGRAD:
        y, x = y * STRIDE_H + parity_h, x * STRIDE_W + parity_w
    valid = (sample < count) & (y < out_height) & (x < out_width)
    finish_tile(
        acc, out, bias, sample_bias, residual, expert, first, sample, y * out_width + x, valid,
        column + tl.arange(0, BN), out_live, out_channels, out_height * out_width,
    )  # fmt: skip


@triton.jit
def _tile(
    source,
    weight,  # boxes of BN channels
    out,
    bias,
    sample_bias,
    residual,
    expert,
    first,
    count,
    box_y,
    box_x,
    y,
    x,
    weight_row,
    column,
    live,
    out_live,
    source_channels,
    out_channels,
    out_height,
    out_width,
    parity_h,
    parity_w,
    taps_h,
    taps_w,
    first_h,
    first_w,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    HALVED: tl.constexpr,
    FILLED: tl.constexpr,
    TAPS_INNER: tl.constexpr,
    TAIL: tl.constexpr,
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN channels of the result, from `column` on."""
    BM: tl.constexpr = NB * TH * TW
    acc = tl.zeros([BN, BM], tl.float32)
    taps = taps_h * taps_w
    across = tl.maximum(taps_w, 1)  # pipelining divides before it knows that there is a tap
    blocks = live // BK
    if FILLED:
        blocks = tl.where(live == source_channels, tl.cdiv(live, BK), blocks)
    for outer in range(blocks if TAPS_INNER else taps):
        for inner in range(taps if TAPS_INNER else blocks):
            tap = inner if TAPS_INNER else outer
            k = (outer if TAPS_INNER else inner) * BK
            acc = _step(
                acc, source, weight, tap // across, tap % across, k, first, y, x, weight_row, column, live,
                source_channels, out_channels, first_h, first_w, S, STRIDE_H, STRIDE_W, DGRAD, HALVED, BM, BN, BK,
                False,
            )  # fmt: skip
    if TAIL:
        for tap in range(tl.where(blocks * BK < live, taps, 0)):
            acc = _step(
                acc, source, weight, tap // across, tap % across, blocks * BK, first, y, x, weight_row, column, live,
                source_channels, out_channels, first_h, first_w, S, STRIDE_H, STRIDE_W, DGRAD, HALVED, BM, BN, BK, True,
            )  # fmt: skip

    if BM > 128:
        left, right = halves(acc)
        _finish(
            left, out, bias, sample_bias, residual, expert, first, count, 0, box_y, box_x, parity_h, parity_w, column,
            out_live, out_channels, out_height, out_width, STRIDE_H, STRIDE_W, DGRAD, TH, TW, BM // 2, BN,
        )  # fmt: skip
        _finish(
            right, out, bias, sample_bias, residual, expert, first, count, BM // 2, box_y, box_x, parity_h, parity_w,
            column, out_live, out_channels, out_height, out_width, STRIDE_H, STRIDE_W, DGRAD, TH, TW, BM // 2, BN,
        )  # fmt: skip
    else:
        _finish(
            acc, out, bias, sample_bias, residual, expert, first, count, 0, box_y, box_x, parity_h, parity_w, column,
            out_live, out_channels, out_height, out_width, STRIDE_H, STRIDE_W, DGRAD, TH, TW, BM, BN,
        )  # fmt: skip


_GEOMETRY = [
    "out_height", "out_width", "grid_height", "grid_width", "chunks", "pad_height", "pad_width", "num_experts",
    "tile_row",
]  # fmt: skip


@triton.jit(do_not_specialize=_GEOMETRY)
def conv_tma_kernel(
    source,  # boxes of (B, H, W, source_channels)
    weight,  # boxes of (E C_out, R S C_in)
    narrow_weight,  # boxes of half as many output channels where NARROW
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
    out_height,
    out_width,
    grid_height,  # pixels that one class of programs serves: of out, or of every STRIDE-th pixel of it
    grid_width,
    chunks,
    pad_height,
    pad_width,
    num_experts,
    tile_row,  # where the table's level begins
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    HALVED: tl.constexpr,
    FILLED: tl.constexpr,  # boxes hold zeros past the last source channel
    TAPS_INNER: tl.constexpr,
    TAIL: tl.constexpr,
    NARROW: tl.constexpr,  # a tile whose second half is dead is half a tile
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BM: tl.constexpr = NB * TH * TW
    channel_tiles = tl.cdiv(out_channels, BN)
    program = tl.program_id(0)
    column = program % channel_tiles * BN
    chunk = (program // channel_tiles) % chunks
    group, first, count = load_tile_row(tiles, tile_row + program // channel_tiles // chunks)
    if group < 0:
        return
    pixel_class = tl.num_programs(1) - 1 - tl.program_id(1)
    parity_h, parity_w = pixel_class // STRIDE_W, pixel_class % STRIDE_W
    taps_h, first_h, base_h = axis_taps(parity_h, pad_height, R, STRIDE_H, DGRAD)
    taps_w, first_w, base_w = axis_taps(parity_w, pad_width, S, STRIDE_W, DGRAD)
    boxes_w = tl.cdiv(grid_width, TW)
    box_y, box_x = chunk // boxes_w * TH, chunk % boxes_w * TW
    y = (box_y if DGRAD else box_y * STRIDE_H) + base_h
    x = (box_x if DGRAD else box_x * STRIDE_W) + base_w

    out_live = live_width(out_widths, group, out_channels)
    live = live_width(source_widths, group, source_channels)
    live = tl.where(column < out_live, live, 0)  # a dead tile has no steps
    expert = expert_of(weight_index, group, num_experts)
    weight_row = expert * source_channels if DGRAD else expert * out_channels + column

    if NARROW and out_live - column <= BN // 2:
        _tile(
            source, narrow_weight, out, bias, sample_bias, residual, expert, first, count, box_y, box_x, y, x,
            weight_row, column, live, out_live, source_channels, out_channels, out_height, out_width, parity_h,
            parity_w, taps_h, taps_w, first_h, first_w, S, STRIDE_H, STRIDE_W, DGRAD, HALVED, FILLED, TAPS_INNER, TAIL,
            NB, TH, TW, BN // 2, BK,
        )  # fmt: skip
        _finish(
            tl.zeros([BN // 2, BM], tl.float32), out, None, None, None, expert, first, count, 0, box_y, box_x,
            parity_h, parity_w, column + BN // 2, out_live, out_channels, out_height, out_width, STRIDE_H, STRIDE_W,
            DGRAD, TH, TW, BM, BN // 2,
        )  # fmt: skip
    else:
        _tile(
            source, weight, out, bias, sample_bias, residual, expert, first, count, box_y, box_x, y, x, weight_row,
            column, live, out_live, source_channels, out_channels, out_height, out_width, parity_h, parity_w, taps_h,
            taps_w, first_h, first_w, S, STRIDE_H, STRIDE_W, DGRAD, HALVED, FILLED, TAPS_INNER, TAIL, NB, TH, TW, BN,
            BK,
        )  # fmt: skip
