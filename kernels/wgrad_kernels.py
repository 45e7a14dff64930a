"""Routed convolution, weight gradient: dweight[e] = sum over the samples of e's groups of dy x (shifted x).

A program computes one tile of one expert's gradient, BM output channels x BN input channels at one tap, over one of S
equal shares of the pixels of every group that uses the expert. It steps through its share BK pixels at a time:

    acc[BM, BN] += dy[BK pixels, BM]^T @ x[the same pixels, shifted by the tap, BN]

Pixels are the rows of both operands, as in memory. Channels are the free dimensions of the product, so a NaN in a dead
channel stays in its own row or column, and one mask per group on the finished sums drops it. With S = 1 the tile is
final; otherwise it is an fp32 partial, and a second launch adds the S partials in ascending order (split_sums.py).
Where bias gradients are wanted, further programs of the same launch compute them (bias_sums.py).

Operands are loaded through pointers, or (BOXED, sm_90 and later) as TMA boxes of TH * TW = BK pixels, whose zero fill
outside the image is the padding; wgmma then reads both from shared memory. Through pointers an upsampled image (UP) is
read at half of row and column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tdc_fast.kernels.bias_sums import Routing, SumForm, Sums, sum_biases
from tdc_fast.kernels.common import live_width, multiply
from tdc_fast.kernels.expert_sums import my_groups, next_group, segment_of
from tdc_fast.kernels.split_sums import share_start


class Geometry(NamedTuple):
    """Sizes of x and dy."""

    height: Any
    width: Any
    in_channels: Any
    out_height: Any
    out_width: Any
    out_channels: Any
    filter_channels: Any  # input channels of a filter in memory: those of the other input too


class Place(NamedTuple):
    """Which tile of the gradient a program computes, and from which share of the pixels."""

    column_out: Any
    column_in: Any
    tap: Any
    taps: Any
    shift_y: Any  # input row of output row 0 at this tap
    shift_x: Any
    split: Any
    splits: Any
    slab: Any  # (split, expert) as one index


class WgradForm(NamedTuple):
    """Compile-time constants; the kernel's arguments of the same names explain them."""

    STRIDE_H: Any
    STRIDE_W: Any
    PRECISION: Any
    GROUPS: Any
    UP: Any
    BOXED: Any
    TH: Any
    TW: Any
    BM: Any
    BN: Any
    BK: Any


@triton.jit
def _operands(
    dy,
    x,
    step,
    first,  # sample
    past,  # sample
    geometry,
    place,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Loads dy [BM, BK] and x [BK, BN] of the group's pixels step * BK ..."""
    BK: tl.constexpr = FORM.BK
    if FORM.BOXED:
        # The pixels of a box of dy are neighbours in memory, rows of a matrix: the left operand of tl.dot would leave
        # shared memory if it were reshaped from a 4-D box; the right one may be.
        columns = geometry.out_width // FORM.TW
        boxes = geometry.out_height // FORM.TH * columns
        sample = first + step // boxes
        box = step % boxes
        row, column = box // columns * FORM.TH, box % columns * FORM.TW
        grad = tl.trans(dy.load([first * (boxes * BK) + step * BK, place.column_out]))
        value = x.load([sample, row + place.shift_y, column + place.shift_x, place.column_in]).reshape(BK, BN)
    else:
        height, width = geometry.height, geometry.width
        pixels = geometry.out_height * geometry.out_width
        near = tl.arange(0, BK)
        flat = step * BK + near
        valid = flat < (past - first) * pixels
        sample, pixel = flat // pixels, flat % pixels
        row = pixel // geometry.out_width * FORM.STRIDE_H + place.shift_y
        column = pixel % geometry.out_width * FORM.STRIDE_W + place.shift_x
        inside = valid & (row >= 0) & (row < height << FORM.UP) & (column >= 0) & (column < width << FORM.UP)
        row, column = row >> FORM.UP, column >> FORM.UP
        outs = place.column_out + tl.arange(0, BM)
        ins = place.column_in + tl.arange(0, BN)
        # 64 bits for the start of the step, 32 for offsets within it. dy is addressed transposed: an operand that is
        # transposed after its load is not copied asynchronously on sm_80.
        grads = dy + (first.to(tl.int64) * pixels + step * BK) * geometry.out_channels
        grad_mask = (outs < geometry.out_channels)[:, None] & valid[None, :]
        grad = tl.load(grads + (near * geometry.out_channels)[None, :] + outs[:, None], mask=grad_mask, other=0.0)
        begin = step * BK // pixels
        values = x + (first + begin).to(tl.int64) * (height * width * geometry.in_channels)
        offset = (((sample - begin) * height + row) * width + column) * geometry.in_channels
        value_mask = inside[:, None] & (ins < geometry.in_channels)[None, :]
        value = tl.load(values + offset[:, None] + ins[None, :], mask=value_mask, other=0.0)
    return grad, value


@triton.jit
def _most_live(widths, number, mine, channels):
    """The largest width of the groups that are `mine`; all channels if there are no widths."""
    if widths is None:
        live = channels
    else:
        live = tl.minimum(tl.maximum(tl.max(tl.load(widths + number, mask=mine, other=0), 0), 0), channels)
    return live


@triton.jit
def _tile(
    dy,  # boxes of BM channels where BOXED
    x,  # boxes of BN channels where BOXED
    out,
    routing,
    geometry,
    place,
    FORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Computes BM x BN channels of the gradient; the rest of the program's tile is dead, and zeros are stored there."""
    outs = place.column_out + tl.arange(0, BM)
    ins = place.column_in + tl.arange(0, BN)
    group = -1
    total = tl.zeros([BM, BN], tl.float32)
    for _ in range(tl.sum(routing.mine.to(tl.int32), 0)):
        group = next_group(routing.number, routing.mine, group, FORM.GROUPS)
        first, past = segment_of(routing.offsets, group, routing.batch)
        out_live = live_width(routing.out_widths, group, geometry.out_channels)
        in_live = live_width(routing.in_widths, group, geometry.in_channels)
        steps = tl.cdiv((past - first) * (geometry.out_height * geometry.out_width), FORM.BK)
        steps = tl.where((place.column_out < out_live) & (place.column_in < in_live), steps, 0)
        acc = tl.zeros([BM, BN], tl.float32)
        begin, end = share_start(steps, place.split, place.splits), share_start(steps, place.split + 1, place.splits)
        for step in range(begin, end):
            grad, value = _operands(dy, x, step, first, past, geometry, place, FORM, BM, BN)
            acc = multiply(grad, value, acc, FORM.PRECISION)
        total += tl.where((outs < out_live)[:, None] & (ins < in_live)[None, :], acc, 0.0)
    _store(total, out, outs, ins, geometry, place)
    if BM < FORM.BM:
        dead = place.column_out + BM + tl.arange(0, FORM.BM - BM)
        all_ins = place.column_in + tl.arange(0, FORM.BN)
        _store(tl.zeros([FORM.BM - BM, FORM.BN], tl.float32), out, dead, all_ins, geometry, place)
    if BN < FORM.BN:
        dead = place.column_in + BN + tl.arange(0, FORM.BN - BN)
        _store(tl.zeros([BM, FORM.BN - BN], tl.float32), out, outs, dead, geometry, place)


@triton.jit
def _store(values, out, outs, ins, geometry, place):
    """Stores values [BM, BN] to the channels outs [BM] x ins [BN] that exist."""
    # 64 bits for the start of the expert's gradient, 32 for offsets within it.
    expert = out + place.slab * geometry.out_channels * place.taps * geometry.filter_channels
    filters = (outs * place.taps + place.tap) * geometry.filter_channels
    stored = (outs < geometry.out_channels)[:, None] & (ins < geometry.in_channels)[None, :]
    tl.store(expert + (filters[:, None] + ins[None, :]), values.to(out.dtype.element_ty), mask=stored)


_GEOMETRY = (
    "batch", "height", "width", "in_channels", "out_height", "out_width", "out_channels", "filter_begin",
    "filter_channels", "pad_height", "pad_width", "filter_width", "taps", "num_groups", "num_experts", "splits",
)  # fmt: skip


@triton.jit(do_not_specialize=_GEOMETRY)
def wgrad_kernel(
    dy,  # (B, out_height, out_width, out_channels), or boxes [BK, BM] of its pixels
    x,  # (B, height, width, in_channels), or boxes [1, TH, TW, BN] of it
    narrow_dy,  # dy, or boxes of half as many channels where NARROW_OUT
    narrow_x,  # x, or boxes of half as many channels where NARROW_IN
    out,  # (splits, E, C_out, taps, filter_channels), fp32 unless there is one split; in_channels of these are written
    rows,  # dy (B, out_height, out_width, out_channels), or None without bias gradients
    bias_out,  # (splits, E, out_channels), fp32 unless there is one split; or None
    sample_bias_out,  # (B, out_channels), or None
    offsets,
    weight_index,
    in_widths,  # (N,) or None
    out_widths,  # (N,) or None
    batch,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    filter_begin,  # which of the filter's channels is x's first
    filter_channels,
    pad_height,
    pad_width,
    filter_width,
    taps,
    num_groups,
    num_experts,
    splits,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    VECTOR_IN: tl.constexpr,  # divides in_channels, filter_*: a masked load or store may access this many at once
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    UP: tl.constexpr,  # 1: every pixel of x stands for 2 x 2
    NARROW_OUT: tl.constexpr,
    NARROW_IN: tl.constexpr,
    BOXED: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SAMPLES: tl.constexpr,  # the tile of the bias gradients
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Computes one tile: program (expert, output tile, tap, input tile), split; then those of the bias gradients."""
    in_channels = (in_channels // VECTOR_IN) * VECTOR_IN
    out_channels = (out_channels // VECTOR_OUT) * VECTOR_OUT
    filter_channels = (filter_channels // VECTOR_IN) * VECTOR_IN
    out += (filter_begin // VECTOR_IN) * VECTOR_IN
    tiles_in, tiles_out = tl.cdiv(in_channels, BN), tl.cdiv(out_channels, BM)
    program, split = tl.program_id(0), tl.program_id(1)
    column_in = program % tiles_in * BN
    tap = program // tiles_in % taps
    column_out = program // (tiles_in * taps) % tiles_out * BM
    expert = program // (tiles_in * taps * tiles_out)
    shift_y, shift_x = tap // filter_width - pad_height, tap % filter_width - pad_width

    # Experts past the last stand for the programs of the bias gradients, which come last.
    biases = expert >= num_experts
    if rows is not None:
        blocks = tl.cdiv(out_channels, CHANNELS)
        program -= num_experts * (tiles_in * taps * tiles_out)
        expert = tl.where(biases, program // blocks, expert)
    number, mine = my_groups(weight_index, expert, num_groups, num_experts, GROUPS)
    routing = Routing(
        offsets=offsets, in_widths=in_widths, out_widths=out_widths, number=number, mine=mine, batch=batch
    )
    slab = split.to(tl.int64) * num_experts + expert
    if rows is not None:
        SUMS: tl.constexpr = SumForm(GROUPS=GROUPS, SAMPLES=SAMPLES, PIXELS=PIXELS, CHANNELS=CHANNELS)
        if biases:
            sums = Sums(
                dy=rows, out=bias_out, sample_out=sample_bias_out, channels=out_channels,
                pixels=out_height * out_width,
            )  # fmt: skip
            sum_biases(sums, routing, program % blocks * CHANNELS, split, splits, slab, SUMS)
            return

    geometry = Geometry(
        height=height, width=width, in_channels=in_channels, out_height=out_height, out_width=out_width,
        out_channels=out_channels, filter_channels=filter_channels,
    )  # fmt: skip
    place = Place(
        column_out=column_out, column_in=column_in, tap=tap, taps=taps, shift_y=shift_y, shift_x=shift_x, split=split,
        splits=splits, slab=slab,
    )  # fmt: skip
    FORM: tl.constexpr = WgradForm(
        STRIDE_H=STRIDE_H, STRIDE_W=STRIDE_W, PRECISION=PRECISION, GROUPS=GROUPS, UP=UP, BOXED=BOXED, TH=TH, TW=TW,
        BM=BM, BN=BN, BK=BK,
    )  # fmt: skip

    # Where the second half of the tile is dead in all groups, only the first is computed.
    live_out = _most_live(out_widths, number, mine, out_channels) - column_out
    live_in = _most_live(in_widths, number, mine, in_channels) - column_in
    if NARROW_OUT and live_out <= BM // 2:
        if NARROW_IN and live_in <= BN // 2:
            _tile(narrow_dy, narrow_x, out, routing, geometry, place, FORM, BM // 2, BN // 2)
        else:
            _tile(narrow_dy, x, out, routing, geometry, place, FORM, BM // 2, BN)
    else:
        if NARROW_IN and live_in <= BN // 2:
            _tile(dy, narrow_x, out, routing, geometry, place, FORM, BM, BN // 2)
        else:
            _tile(dy, x, out, routing, geometry, place, FORM, BM, BN)
