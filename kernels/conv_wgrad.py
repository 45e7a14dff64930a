"""Routed convolution, weight gradient: dweight[e] = sum over the samples of e's groups of dy x (shifted x).

A program owns one tile of one expert's gradient, BM output channels x BN input channels at one tap, and one of S equal
shares of the pixels of every group that uses the expert. It steps through its share BK pixels at a time:

    acc[BM, BN] += dy[BK pixels, BM]^T @ x[the same pixels, shifted by the tap, BN]

Both operands have pixels in rows, as memory has them; channels are the free dimensions of the product, so what a dead
channel holds (NaN perhaps) stays in its own row or column, and one mask per group, on the finished sums, drops it.
With S = 1 the tile is final. Otherwise it is an fp32 partial, and a second launch adds the S partials, s ascending.

Operands come through pointers, or (BOXED, sm_90 and later) as TMA boxes of TH * TW = BK pixels,
whose zero fill outside the image is the padding; wgmma then reads both from shared memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels import wgrad_tiles
from tdc_fast.kernels.common import live_width, multiply
from tdc_fast.kernels.expert_sums import segment_of
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.tile_shapes import device_of, precision_of
from tdc_fast.kernels.wgrad_tiles import WgradTile

_SUM_BLOCK = 1024
_GEOMETRY = (
    "batch", "height", "width", "in_channels", "out_height", "out_width", "out_channels", "pad_height", "pad_width",
    "filter_width", "taps", "num_groups", "num_experts", "splits",
)  # fmt: skip


@triton.jit
def _operands(
    dy,
    x,
    step,
    first,  # sample
    past,  # sample
    column_out,
    column_in,
    shift_y,  # input row of output row 0 at this tap
    shift_x,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BOXED: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dy [BM, BK] and x [BK, BN] of the group's pixels step * BK ..."""
    if BOXED:
        # The pixels of a box of dy are neighbours in memory, rows of a matrix: the left operand of tl.dot would lose
        # its place in shared memory if it were reshaped from a 4-D box, as the right one may be.
        columns = out_width // TW
        boxes = out_height // TH * columns
        sample = first + step // boxes
        box = step % boxes
        row, column = box // columns * TH, box % columns * TW
        grad = tl.trans(dy.load([first * (boxes * BK) + step * BK, column_out]))
        value = x.load([sample, row + shift_y, column + shift_x, column_in]).reshape(BK, BN)
    else:
        pixels = out_height * out_width
        near = tl.arange(0, BK)
        flat = step * BK + near
        valid = flat < (past - first) * pixels
        sample, pixel = flat // pixels, flat % pixels
        row = pixel // out_width * STRIDE_H + shift_y
        column = pixel % out_width * STRIDE_W + shift_x
        inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        outs = column_out + tl.arange(0, BM)
        ins = column_in + tl.arange(0, BN)
        # 64 bits for where the step begins, 32 for what lies within it. dy is addressed transposed: an operand that is
        # transposed after its load is not copied asynchronously on sm_80.
        grads = dy + (first.to(tl.int64) * pixels + step * BK) * out_channels
        grad_mask = (outs < out_channels)[:, None] & valid[None, :]
        grad = tl.load(grads + (near * out_channels)[None, :] + outs[:, None], mask=grad_mask, other=0.0)
        begin = step * BK // pixels
        values = x + (first + begin).to(tl.int64) * (height * width * in_channels)
        place = (((sample - begin) * height + row) * width + column) * in_channels
        value_mask = inside[:, None] & (ins < in_channels)[None, :]
        value = tl.load(values + place[:, None] + ins[None, :], mask=value_mask, other=0.0)
    return grad, value


@triton.jit
def share_start(steps, split, splits):
    """First step of a share; the remainder goes to the first shares. steps * splits may pass 32 bits."""
    return steps // splits * split + tl.minimum(steps % splits, split)


@triton.jit
def _most_live(widths, number, mine, channels):
    """Live channels of the group that has the most, of those that are `mine`: all of them without widths."""
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
    offsets,
    in_widths,
    out_widths,
    number,  # [GROUPS]
    mine,  # [GROUPS]
    batch,
    column_out,
    column_in,
    shift_y,
    shift_x,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    out_channels,
    split,
    splits,
    slab,
    tap,
    taps,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BOXED: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """BM x BN channels of the gradient; the others of ROWS x COLUMNS are dead, and zeros are written there."""
    outs = column_out + tl.arange(0, BM)
    ins = column_in + tl.arange(0, BN)
    group = -1
    total = tl.zeros([BM, BN], tl.float32)
    for _ in range(tl.sum(mine.to(tl.int32), 0)):
        group = tl.min(tl.where(mine & (number > group), number, GROUPS), 0)
        first, past = segment_of(offsets, group, batch)
        out_live = live_width(out_widths, group, out_channels)
        in_live = live_width(in_widths, group, in_channels)
        steps = tl.cdiv((past - first) * (out_height * out_width), BK)
        steps = tl.where((column_out < out_live) & (column_in < in_live), steps, 0)
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(share_start(steps, split, splits), share_start(steps, split + 1, splits)):
            grad, value = _operands(
                dy, x, step, first, past, column_out, column_in, shift_y, shift_x, height, width, in_channels,
                out_height, out_width, out_channels, STRIDE_H, STRIDE_W, BOXED, TH, TW, BM, BN, BK,
            )  # fmt: skip
            acc = multiply(grad, value, acc, PRECISION)
        total += tl.where((outs < out_live)[:, None] & (ins < in_live)[None, :], acc, 0.0)
    _store(total, out, outs, ins, slab, tap, taps, in_channels, out_channels)
    if BM < ROWS:
        dead = column_out + BM + tl.arange(0, ROWS - BM)
        all_ins = column_in + tl.arange(0, COLUMNS)
        _store(
            tl.zeros([ROWS - BM, COLUMNS], tl.float32), out, dead, all_ins, slab, tap, taps, in_channels, out_channels
        )
    if BN < COLUMNS:
        dead = column_in + BN + tl.arange(0, COLUMNS - BN)
        _store(tl.zeros([BM, COLUMNS - BN], tl.float32), out, outs, dead, slab, tap, taps, in_channels, out_channels)


@triton.jit
def _store(values, out, outs, ins, slab, tap, taps, in_channels, out_channels):
    place = (slab * out_channels + outs[:, None]) * taps + tap  # [BM, 1]
    stored = (outs < out_channels)[:, None] & (ins < in_channels)[None, :]
    tl.store(out + place * in_channels + ins[None, :], values.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_GEOMETRY)
def wgrad_kernel(
    dy,  # (B, out_height, out_width, out_channels), or boxes [BK, BM] of its pixels
    x,  # (B, height, width, in_channels), or boxes [1, TH, TW, BN] of it
    narrow_dy,  # dy, or boxes of half as many channels where NARROW_OUT
    narrow_x,  # x, or boxes of half as many channels where NARROW_IN
    out,  # (splits, E, C_out, taps, C_in), fp32 unless there is one split
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
    pad_height,
    pad_width,
    filter_width,
    taps,
    num_groups,
    num_experts,
    splits,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    VECTOR_IN: tl.constexpr,  # divides in_channels: lets a masked load be one access of so many channels
    VECTOR_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    NARROW_OUT: tl.constexpr,
    NARROW_IN: tl.constexpr,
    BOXED: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    in_channels = (in_channels // VECTOR_IN) * VECTOR_IN
    out_channels = (out_channels // VECTOR_OUT) * VECTOR_OUT
    tiles_in, tiles_out = tl.cdiv(in_channels, BN), tl.cdiv(out_channels, BM)
    program, split = tl.program_id(0), tl.program_id(1)
    column_in = program % tiles_in * BN
    tap = program // tiles_in % taps
    column_out = program // (tiles_in * taps) % tiles_out * BM
    expert = program // (tiles_in * taps * tiles_out)
    shift_y, shift_x = tap // filter_width - pad_height, tap % filter_width - pad_width

    number = tl.arange(0, GROUPS)
    exists = number < num_groups
    named = tl.load(weight_index + number, mask=exists, other=0)
    mine = exists & (tl.minimum(tl.maximum(named, 0), num_experts - 1) == expert)
    slab = split.to(tl.int64) * num_experts + expert

    # Of a tile whose second half is dead in all groups the first half is enough.
    live_out = _most_live(out_widths, number, mine, out_channels) - column_out
    live_in = _most_live(in_widths, number, mine, in_channels) - column_in
    if NARROW_OUT and live_out <= BM // 2:
        if NARROW_IN and live_in <= BN // 2:
            _tile(
                narrow_dy, narrow_x, out, offsets, in_widths, out_widths, number, mine, batch, column_out, column_in,
                shift_y, shift_x, height, width, in_channels, out_height, out_width, out_channels, split, splits, slab,
                tap, taps, STRIDE_H, STRIDE_W, PRECISION, GROUPS, BOXED, TH, TW, BM // 2, BN // 2, BK, BM, BN,
            )  # fmt: skip
        else:
            _tile(
                narrow_dy, x, out, offsets, in_widths, out_widths, number, mine, batch, column_out, column_in, shift_y,
                shift_x, height, width, in_channels, out_height, out_width, out_channels, split, splits, slab, tap,
                taps, STRIDE_H, STRIDE_W, PRECISION, GROUPS, BOXED, TH, TW, BM // 2, BN, BK, BM, BN,
            )  # fmt: skip
    else:
        if NARROW_IN and live_in <= BN // 2:
            _tile(
                dy, narrow_x, out, offsets, in_widths, out_widths, number, mine, batch, column_out, column_in, shift_y,
                shift_x, height, width, in_channels, out_height, out_width, out_channels, split, splits, slab, tap,
                taps, STRIDE_H, STRIDE_W, PRECISION, GROUPS, BOXED, TH, TW, BM, BN // 2, BK, BM, BN,
            )  # fmt: skip
        else:
            _tile(
                dy, x, out, offsets, in_widths, out_widths, number, mine, batch, column_out, column_in, shift_y,
                shift_x, height, width, in_channels, out_height, out_width, out_channels, split, splits, slab, tap,
                taps, STRIDE_H, STRIDE_W, PRECISION, GROUPS, BOXED, TH, TW, BM, BN, BK, BM, BN,
            )  # fmt: skip


@triton.jit(do_not_specialize=("elements", "splits"))
def sum_splits_kernel(partial, out, elements, splits, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum of partial[s, i], s ascending. VECTOR divides elements."""
    elements = (elements // VECTOR) * VECTOR
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * elements.to(tl.int64) + place, mask=place < elements, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < elements)


@functools.lru_cache(maxsize=4096)
def _constants(
    p: Any, tile: WgradTile, splits: int, in_widths: bool, out_widths: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """(grid, the arguments that are no tensors)."""
    rows, columns = wgrad_tiles.box_of(tile, p) if tile.path == "tma" else (1, tile.block_pixels)
    constants = {
        "batch": p.batch,
        "height": p.height,
        "width": p.width,
        "in_channels": p.in_channels,
        "out_height": p.out_height,
        "out_width": p.out_width,
        "out_channels": p.out_channels,
        "pad_height": p.padding[0],
        "pad_width": p.padding[1],
        "filter_width": p.filter[1],
        "taps": p.filter[0] * p.filter[1],
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
        "splits": splits,
        "STRIDE_H": p.stride[0],
        "STRIDE_W": p.stride[1],
        "VECTOR_IN": _vector(p.in_channels, p.dtype.itemsize),
        "VECTOR_OUT": _vector(p.out_channels, p.dtype.itemsize),
        "PRECISION": precision_of(p),
        # Half a tile of fewer channels would not fill wgmma's 64 rows.
        "NARROW_OUT": out_widths and tile.block_out >= 128,
        "NARROW_IN": in_widths and tile.block_in >= 128,
        "GROUPS": triton.next_power_of_2(p.num_groups),
        "BOXED": tile.path == "tma",
        "TH": rows,
        "TW": columns,
        "BM": tile.block_out,
        "BN": tile.block_in,
        "BK": tile.block_pixels,
    }
    return (wgrad_tiles.tiles_of_gradient(p, tile), splits), constants


def _vector(channels: int, itemsize: int) -> int:
    """The most channels, up to 16 bytes, that rows of so many channels can be cut into."""
    vector = 16 // itemsize
    while channels % vector:
        vector //= 2
    return vector


def _pixel_rows(dy: Tensor, pixels: int, channels: int) -> TensorDescriptor:
    """Boxes [pixels, channels] of dy (B, C, H, W) in channels_last memory, seen as a matrix of B * H * W rows."""
    batch, depth, height, width = dy.shape
    return TensorDescriptor(dy, [batch * height * width, depth], [depth, 1], [pixels, channels])


def _boxes(x: Tensor, rows: int, columns: int, channels: int) -> TensorDescriptor:
    """Boxes [1, rows, columns, channels] of x (B, C, H, W) in channels_last memory."""
    batch, depth, height, width = x.shape
    shape, strides = [batch, height, width, depth], [height * width * depth, width * depth, depth, 1]
    return TensorDescriptor(x, shape, strides, [1, rows, columns, channels])


def wgrad_launches(
    problem: Any,
    dy: Tensor,
    x: Tensor,
    dweight: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    tile: WgradTile | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """The launches of `conv_wgrad`, computed from shapes alone; compile-only tests read their arguments."""
    if tile is None:
        aligned = dy.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
        tile = wgrad_tiles.choose_wgrad_tile(problem, device_of(problem.device), None if aligned else "pointer")
    if splits is None:
        splits = wgrad_tiles.choose_splits(problem, tile, device_of(problem.device))
    grid, constants = _constants(problem, tile, splits, in_widths is not None, out_widths is not None)
    out = dweight
    if splits > 1:
        out = torch.empty((splits, dweight.numel()), dtype=torch.float32, device=dweight.device)
    tensors = {
        "dy": dy,
        "x": x,
        "narrow_dy": dy if constants["NARROW_OUT"] else None,
        "narrow_x": x if constants["NARROW_IN"] else None,
        "out": out,
        "offsets": offsets,
        "weight_index": weight_index,
        "in_widths": in_widths,
        "out_widths": out_widths,
    }
    if tile.path == "tma":
        tensors["dy"] = _pixel_rows(dy, tile.block_pixels, tile.block_out)
        tensors["x"] = _boxes(x, constants["TH"], constants["TW"], tile.block_in)
        if constants["NARROW_OUT"]:
            tensors["narrow_dy"] = _pixel_rows(dy, tile.block_pixels, tile.block_out // 2)
        if constants["NARROW_IN"]:
            tensors["narrow_x"] = _boxes(x, constants["TH"], constants["TW"], tile.block_in // 2)
    key, options = (problem, tile, splits), {"num_warps": tile.warps, "num_stages": tile.stages}
    launches = [Launch(wgrad_kernel, grid, tensors, constants, options, key)]
    if splits > 1:
        elements = dweight.numel()
        sums = {"elements": elements, "splits": splits, "BLOCK": _SUM_BLOCK, "VECTOR": _vector(elements, itemsize=4)}
        sum_grid, shares = (triton.cdiv(elements, _SUM_BLOCK),), {"partial": out, "out": dweight}
        launches.append(Launch(sum_splits_kernel, sum_grid, shares, sums, {"num_warps": 4}, key))
    return launches


def conv_wgrad(
    problem: Any,
    dy: Tensor,
    x: Tensor,
    dweight: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    *,
    tile: WgradTile | None = None,
    splits: int | None = None,
) -> None:
    """Writes every element of dweight, in one launch or two; sums in fp32 and in one order; nothing is read back.

    problem: a ConvProblem of at least one sample, that `wgrad_supported`. dy (B, C_out, OH, OW) and x (B, C_in, H, W)
    in channels_last memory; dweight (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in; offsets (N + 1,),
    weight_index and widths (N,) int32, all contiguous.
    tile, splits: run these instead of the chosen ones (benches and tests).
    """
    for launch in wgrad_launches(problem, dy, x, dweight, offsets, weight_index, in_widths, out_widths, tile, splits):
        launch.run()


def wgrad_supported(problem: Any) -> str | None:
    """None, or why the kernel cannot serve a problem whose forward is served."""
    pixels = problem.batch * max(problem.out_height * problem.out_width, problem.height * problem.width)
    if pixels >= 2**30:
        return f"it counts pixels with 32 bits: {pixels} in a batch are too many"
    step_images = 2 + 64 // (problem.out_height * problem.out_width)  # that the pixels of one step may touch
    if step_images * problem.height * problem.width * problem.in_channels >= 2**31:
        return "it indexes the images of one step with 32 bits: 2**31 elements are too many"
    if problem.num_experts * problem.out_channels * problem.filter[0] * problem.filter[1] >= 2**31:
        return "it counts the filters of all experts with 32 bits: 2**31 are too many"
    return None
