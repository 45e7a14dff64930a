"""Routed convolution through tensor descriptors: forward and dgrad on sm_90 and later, bf16 and fp16.

A tile covers NB samples x TH rows x TW columns. Its source is loaded as a box [NB, TH, TW, BK] per tap and block of BK
channels. The copy engine fills pixels outside the image with zeros, which is the padding.

    acc[BN, BM] += weights[BN, BK] @ box[BM, BK]^T

With this order of operands wgmma reads both from shared memory, where the copies put them: in tl.dot the right operand
stays there when a 4-D box is reshaped, the left one does not. Stride 2 loads every other pixel through the view
[B, H/2, 2, W/2, 2 C] (HALVED). A box may reach past the end of its group: the rows of other samples are computed and
dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels.common import (
    Addends,
    Image,
    Output,
    Samples,
    axis_taps,
    expert_of,
    finish_tile,
    halves,
    live_width,
    load_tile_row,
    multiply,
)


def source_descriptor(source: Tensor, constants: dict[str, Any]) -> TensorDescriptor:
    """Boxes of x or dy, (B, C, H, W) in channels_last memory."""
    batch, channels, height, width = source.shape
    nb, th, tw, bk = (constants[name] for name in ("NB", "TH", "TW", "BK"))
    image, row = height * width * channels, width * channels
    if constants["HALVED"]:
        shape = [batch, height // 2, 2, width // 2, 2 * channels]
        return TensorDescriptor(source, shape, [image, 2 * row, row, 2 * channels, 1], [nb, th, 1, tw, bk])
    return TensorDescriptor(source, [batch, height, width, channels], [image, row, channels, 1], [nb, th, tw, bk])


def weight_descriptor(weight: Tensor, constants: dict[str, Any], channels: int) -> TensorDescriptor:
    """Boxes of the weights, seen as a matrix (E C_out, R S C_in).

    A matrix, because the left operand of tl.dot would have to leave shared memory if it were reshaped.

    Args:
        weight: (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in.
        constants: The kernel's constants, of which BK and DGRAD are read.
        channels: Output channels (DGRAD: input channels) of a box.
    """
    experts, c_out, c_in, rows, columns = weight.shape
    bk = constants["BK"]
    length = rows * columns * c_in
    block = [bk, channels] if constants["DGRAD"] else [channels, bk]
    return TensorDescriptor(weight, [experts * c_out, length], [length, 1], block)


class Operands(NamedTuple):
    """The tensors that a tile multiplies."""

    source: Any  # boxes of (B, H, W, channels), or None
    weight: Any  # boxes of (E C_out, R S C_in), of as many output channels as the tile has
    channels: Any  # of the source: all that are multiplied, or those of one of two inputs
    first: Any  # channel of the weights that meets its first
    weight_channels: Any


class Corner(NamedTuple):
    """Where a tile begins."""

    y: Any  # pixel of the grid
    x: Any
    source_y: Any  # pixel of the source at the first tap
    source_x: Any
    parity_h: Any  # dgrad: pixel coordinate modulo the stride
    parity_w: Any
    weight_row: Any


class TmaForm(NamedTuple):
    """Compile-time constants; the kernel's arguments of the same names explain them."""

    S: Any
    STRIDE_H: Any
    STRIDE_W: Any
    DGRAD: Any
    HALVED: Any
    FILLED: Any
    TAPS_INNER: Any
    TAIL: Any
    TH: Any
    TW: Any
    BM: Any  # NB * TH * TW
    BK: Any


@triton.jit
def _step(
    acc,  # [BN, BM]
    operands,
    first_sample,
    live,  # channels of the source
    corner,
    column,
    out_channels,
    taps_h,
    taps_w,
    tap_h,
    tap_w,
    k,
    FORM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Multiplies one box at one tap."""
    y, x = corner.source_y, corner.source_x
    if FORM.DGRAD:
        tap = (taps_h.first + tap_h * FORM.STRIDE_H) * FORM.S + taps_w.first + tap_w * FORM.STRIDE_W
        box = operands.source.load([first_sample, y - tap_h, x - tap_w, k])
        a = operands.weight.load([corner.weight_row + k, tap * out_channels + column])
    else:
        tap = tap_h * FORM.S + tap_w
        if FORM.HALVED:
            # Coordinates may be -1: shifts and masks round them down, where a division would round up.
            row, col = y + tap_h, x + tap_w
            box = operands.source.load([first_sample, row >> 1, row & 1, col >> 1, (col & 1) * operands.channels + k])
        else:
            box = operands.source.load([first_sample, y + tap_h, x + tap_w, k])
        a = operands.weight.load([corner.weight_row, tap * operands.weight_channels + operands.first + k])
    b = box.reshape(FORM.BM, FORM.BK)
    if MASKED:
        alive = k + tl.arange(0, FORM.BK) < live
        a = tl.where(alive[:, None] if FORM.DGRAD else alive[None, :], a, 0.0)
        b = tl.where(alive[None, :], b, 0.0)
    if FORM.DGRAD:
        a = tl.trans(a)
    return multiply(a, tl.trans(b), acc, "ieee")


@triton.jit
def _finish(
    acc,  # [BN, ROWS]
    image,
    addends,
    samples,
    corner,
    column,
    begin,  # first of these rows within the box
    FORM: tl.constexpr,
):
    """Stores some rows of the box to their pixels of the result."""
    place = begin + tl.arange(0, acc.shape[1])
    sample = place // (FORM.TH * FORM.TW)
    y = corner.y + place // FORM.TW % FORM.TH
    x = corner.x + place % FORM.TW
    if FORM.DGRAD:
        y, x = y * FORM.STRIDE_H + corner.parity_h, x * FORM.STRIDE_W + corner.parity_w
    valid = (sample < samples.count) & (y < image.height) & (x < image.width)
    pixel = y * image.width + x
    columns = column + tl.arange(0, acc.shape[0])
    output = Output(
        pointer=image.pointer, pointer2=image.pointer2, pixels=image.height * image.width, channels=image.channels,
        seam=image.seam,
    )  # fmt: skip
    finish_tile(acc, output, addends, samples, sample, pixel, valid, columns)


@triton.jit
def _accumulate(
    acc,  # [BN, BM]
    operands,
    first_sample,
    live,  # channels of the source
    corner,
    column,
    out_channels,
    taps_h,
    taps_w,
    FORM: tl.constexpr,
):
    """Multiplies all live channels of one source."""
    BK: tl.constexpr = FORM.BK
    taps = taps_h.count * taps_w.count
    across = tl.maximum(taps_w.count, 1)  # pipelining divides before it knows that there is a tap
    blocks = tl.cdiv(live, BK) if FORM.FILLED else live // BK
    for outer in range(blocks if FORM.TAPS_INNER else taps):
        for inner in range(taps if FORM.TAPS_INNER else blocks):
            tap = inner if FORM.TAPS_INNER else outer
            k = (outer if FORM.TAPS_INNER else inner) * BK
            acc = _step(
                acc, operands, first_sample, live, corner, column, out_channels, taps_h, taps_w, tap // across,
                tap % across, k, FORM, False,
            )  # fmt: skip
    if FORM.TAIL:
        for tap in range(tl.where(blocks * BK < live, taps, 0)):
            acc = _step(
                acc, operands, first_sample, live, corner, column, out_channels, taps_h, taps_w, tap // across,
                tap % across, blocks * BK, FORM, True,
            )  # fmt: skip
    return acc


@triton.jit
def _tile(
    operands,
    operands2,
    image,  # of the result
    addends,
    samples,
    corner,
    column,
    taps_h,
    taps_w,
    FORM: tl.constexpr,
    BN: tl.constexpr,
):
    """Computes BN channels of the result, from `column` on."""
    BM: tl.constexpr = FORM.BM
    acc = tl.zeros([BN, BM], tl.float32)
    live = samples.live if operands2.source is None else tl.minimum(samples.live, operands2.first)
    acc = _accumulate(
        acc, operands, samples.first, live, corner, column, image.channels, taps_h, taps_w, FORM
    )  # fmt: skip
    if operands2.source is not None:
        live = tl.maximum(samples.live - operands2.first, 0)
        acc = _accumulate(
            acc, operands2, samples.first, live, corner, column, image.channels, taps_h, taps_w, FORM
        )  # fmt: skip

    if BM > 128:
        left, right = halves(acc)
        _finish(left, image, addends, samples, corner, column, 0, FORM)
        _finish(right, image, addends, samples, corner, column, BM // 2, FORM)
    else:
        _finish(acc, image, addends, samples, corner, column, 0, FORM)


_GEOMETRY = [
    "out_height", "out_width", "grid_height", "grid_width", "chunks", "pad_height", "pad_width", "num_experts",
    "tile_row",
]  # fmt: skip


@triton.jit(do_not_specialize=_GEOMETRY)
def conv_tma_kernel(
    source,  # boxes of (B, H, W, source_channels), with source2 less x2_channels
    source2,  # boxes of (B, H, W, x2_channels): the last source channels, or None
    weight,  # boxes of (E C_out, R S C_in)
    narrow_weight,  # boxes of half as many output channels where NARROW
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
    out_height,
    out_width,
    grid_height,  # of the pixels that the programs of one class compute: all of out, or every STRIDE-th one
    grid_width,
    chunks,
    pad_height,
    pad_width,
    num_experts,
    tile_row,  # first row of the table's level
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DGRAD: tl.constexpr,
    HALVED: tl.constexpr,
    FILLED: tl.constexpr,  # boxes hold zeros past the live source channels
    TAPS_INNER: tl.constexpr,
    TAIL: tl.constexpr,
    NARROW: tl.constexpr,  # where the second half of a tile's channels is dead, only the first is computed
    NB: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Computes one tile: program (row of the table, chunk of pixels, channel tile), class of pixels."""
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
    taps_h = axis_taps(parity_h, pad_height, R, STRIDE_H, DGRAD)
    taps_w = axis_taps(parity_w, pad_width, S, STRIDE_W, DGRAD)
    boxes_w = tl.cdiv(grid_width, TW)
    box_y, box_x = chunk // boxes_w * TH, chunk % boxes_w * TW
    y = (box_y if DGRAD else box_y * STRIDE_H) + taps_h.base
    x = (box_x if DGRAD else box_x * STRIDE_W) + taps_w.base

    out_live = live_width(out_widths, group, out_channels)
    live = live_width(source_widths, group, source_channels)
    live = tl.where(column < out_live, live, 0)  # a dead tile has no steps
    expert = expert_of(weight_index, group, num_experts)
    weight_row = expert * source_channels if DGRAD else expert * out_channels + column

    image = Image(
        pointer=out, pointer2=out2, height=out_height, width=out_width, channels=out_channels,
        seam=out_channels - x2_channels,
    )  # fmt: skip
    addends = Addends(bias=bias, sample_bias=sample_bias, residual=residual)
    samples = Samples(expert=expert, first=first, count=count, live=live, out_live=out_live)
    corner = Corner(
        y=box_y, x=box_x, source_y=y, source_x=x, parity_h=parity_h, parity_w=parity_w, weight_row=weight_row
    )
    FORM: tl.constexpr = TmaForm(
        S=S, STRIDE_H=STRIDE_H, STRIDE_W=STRIDE_W, DGRAD=DGRAD, HALVED=HALVED, FILLED=FILLED, TAPS_INNER=TAPS_INNER,
        TAIL=TAIL, TH=TH, TW=TW, BM=BM, BK=BK,
    )  # fmt: skip
    own = source_channels if source2 is None else source_channels - x2_channels
    whole = Operands(source=source, weight=weight, channels=own, first=0, weight_channels=source_channels)
    whole2 = Operands(source=source2, weight=weight, channels=x2_channels, first=own, weight_channels=source_channels)
    half = Operands(source=source, weight=narrow_weight, channels=own, first=0, weight_channels=source_channels)
    half2 = Operands(
        source=source2, weight=narrow_weight, channels=x2_channels, first=own, weight_channels=source_channels
    )  # fmt: skip
    if NARROW and out_live - column <= BN // 2:
        _tile(half, half2, image, addends, samples, corner, column, taps_h, taps_w, FORM, BN // 2)
        zeros, nothing = tl.zeros([BN // 2, BM], tl.float32), Addends(bias=None, sample_bias=None, residual=None)
        _finish(zeros, image, nothing, samples, corner, column + BN // 2, 0, FORM)
    else:
        _tile(whole, whole2, image, addends, samples, corner, column, taps_h, taps_w, FORM, BN)
