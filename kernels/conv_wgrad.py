"""Routed convolution, gradients of weights and biases: arguments and launches of the kernels in wgrad_kernels.py."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels import wgrad_tiles
from tdc_fast.kernels.bias_sums import bias_launches, sum_tile
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.split_sums import sum_splits_launch, widest_access
from tdc_fast.kernels.tile_shapes import device_of, precision_of
from tdc_fast.kernels.wgrad_kernels import wgrad_kernel
from tdc_fast.kernels.wgrad_tiles import WgradTile


@functools.lru_cache(maxsize=4096)
def _constants(
    p: ConvProblem, tile: WgradTile, splits: int, filters: tuple[int, int], given: tuple[bool, ...]
) -> tuple[tuple[int, int], dict[str, Any]]:
    """(grid, the arguments that are not tensors).

    filters: which input channel of the filters is the problem's first, and how many they have.
    given: whether there are in_widths, out_widths, bias gradients, and sums of each sample.
    """
    begin, filter_channels = filters
    in_widths, out_widths, biases, per_sample = given
    rows, columns = wgrad_tiles.pixel_box(tile, p) if tile.path == "tma" else (1, tile.block_pixels)
    samples, pixels, channels = sum_tile(p, per_sample, tile.warps)
    constants = {
        "batch": p.batch,
        "height": p.height,
        "width": p.width,
        "in_channels": p.in_channels,
        "out_height": p.out_height,
        "out_width": p.out_width,
        "out_channels": p.out_channels,
        "filter_begin": begin,
        "filter_channels": filter_channels,
        "pad_height": p.padding[0],
        "pad_width": p.padding[1],
        "filter_width": p.filter[1],
        "taps": p.filter[0] * p.filter[1],
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
        "splits": splits,
        "STRIDE_H": p.stride[0],
        "STRIDE_W": p.stride[1],
        "VECTOR_IN": widest_access(math.gcd(p.in_channels, begin, filter_channels), p.dtype.itemsize),
        "VECTOR_OUT": widest_access(p.out_channels, p.dtype.itemsize),
        "PRECISION": precision_of(p),
        # Half of a smaller tile would not fill wgmma's 64 rows.
        "NARROW_OUT": out_widths and tile.block_out >= 128,
        "NARROW_IN": in_widths and tile.block_in >= 128,
        "GROUPS": triton.next_power_of_2(p.num_groups),
        "UP": p.upsample // 2,
        "BOXED": tile.path == "tma",
        "TH": rows,
        "TW": columns,
        "BM": tile.block_out,
        "BN": tile.block_in,
        "BK": tile.block_pixels,
        "SAMPLES": samples,
        "PIXELS": pixels,
        "CHANNELS": channels,
    }
    programs = wgrad_tiles.tiles_of_gradient(p, tile)
    if biases:
        programs += p.num_experts * triton.cdiv(p.out_channels, channels)
    return (programs, splits), constants


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
    problem: ConvProblem,
    dy: Tensor,
    t: ConvTensors,
    dweight: Tensor | None,
    dbias: Tensor | None = None,
    dsample_bias: Tensor | None = None,
    tile: WgradTile | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """The launches of `conv_wgrad`, computed from shapes alone; compile-only tests read their arguments."""
    if dweight is None:
        return bias_launches(problem, dy, t, dbias, dsample_bias)
    inputs = [
        (part, tile or _tile_for(part, dy, tensors.x), tensors, begin) for part, tensors, begin in _inputs(problem, t)
    ]
    if splits is None:
        device = device_of(problem.device)
        splits = max(wgrad_tiles.choose_splits(part, chosen, device) for part, chosen, _, _ in inputs)
    out, bias_out = dweight, dbias
    if splits > 1:
        out = torch.empty((splits, dweight.numel()), dtype=torch.float32, device=dweight.device)
        if dbias is not None:
            bias_out = torch.empty((splits, *dbias.shape), dtype=torch.float32, device=dbias.device)
    biases = (bias_out, dsample_bias)  # with the first input
    launches = []
    for part, chosen, tensors, begin in inputs:
        launches.append(_launch(part, chosen, splits, dy, tensors, out, (begin, problem.in_channels), *biases))
        biases = (None, None)
    if splits > 1:
        partials, outs = [out], [dweight]
        if bias_out is not None and dbias is not None:
            partials, outs = [out, bias_out], [dweight, dbias]
        launches.append(sum_splits_launch(partials, outs, key=(problem, splits, dbias is None)))
    return launches


def _inputs(p: ConvProblem, t: ConvTensors) -> list[tuple[ConvProblem, ConvTensors, int]]:
    """The problem of each input alone, its tensors, and the first of its channels among those of both."""
    if t.x2 is None:
        return [(p, t, 0)]
    first, widths = p.in_channels - p.x2_channels, t.in_widths
    second = None if widths is None else widths - first  # the kernel clamps them
    return [
        (replace(p, in_channels=first, x2_channels=0), t._replace(x2=None), 0),
        (replace(p, in_channels=p.x2_channels, x2_channels=0), t._replace(x=t.x2, x2=None, in_widths=second), first),
    ]


def _tile_for(p: ConvProblem, dy: Tensor, x: Tensor) -> WgradTile:
    aligned = dy.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    return wgrad_tiles.choose_wgrad_tile(p, device_of(p.device), None if aligned else "pointer")


def _launch(
    p: ConvProblem,
    tile: WgradTile,
    splits: int,
    dy: Tensor,
    t: ConvTensors,
    out: Tensor,
    filters: tuple[int, int],
    bias_out: Tensor | None,
    sample_bias_out: Tensor | None,
) -> Launch:
    """The launch for one input.

    Args:
        p: of this input.
        tile: of p.
        splits: of the pixels.
        dy: of both inputs.
        t: x is this input.
        out: the gradient of both inputs' channels, or its partials.
        filters: this input's first channel there, and the channels of both.
        bias_out: dbias or its partials, or None.
        sample_bias_out: dsample_bias, or None.
    """
    x, biases = t.x, bias_out is not None or sample_bias_out is not None
    given = (t.in_widths is not None, t.out_widths is not None, biases, sample_bias_out is not None)
    grid, constants = _constants(p, tile, splits, filters, given)
    tensors: dict[str, Tensor | TensorDescriptor | None] = {
        "dy": dy,
        "x": x,
        "narrow_dy": dy if constants["NARROW_OUT"] else None,
        "narrow_x": x if constants["NARROW_IN"] else None,
        "out": out,
        "rows": dy if biases else None,
        "bias_out": bias_out,
        "sample_bias_out": sample_bias_out,
        "offsets": t.offsets,
        "weight_index": t.weight_index,
        "in_widths": t.in_widths,
        "out_widths": t.out_widths,
    }
    if tile.path == "tma":
        tensors["dy"] = _pixel_rows(dy, tile.block_pixels, tile.block_out)
        tensors["x"] = _boxes(x, constants["TH"], constants["TW"], tile.block_in)
        if constants["NARROW_OUT"]:
            tensors["narrow_dy"] = _pixel_rows(dy, tile.block_pixels, tile.block_out // 2)
        if constants["NARROW_IN"]:
            tensors["narrow_x"] = _boxes(x, constants["TH"], constants["TW"], tile.block_in // 2)
    key, options = (p, tile, splits, filters), {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(wgrad_kernel, grid, tensors, constants, options, key)


def conv_wgrad(
    problem: ConvProblem,
    dy: Tensor,
    t: ConvTensors,
    dweight: Tensor | None,
    dbias: Tensor | None = None,
    dsample_bias: Tensor | None = None,
    *,
    tile: WgradTile | None = None,
    splits: int | None = None,
) -> None:
    """Writes every element of the gradients that are given, in one launch per input and one that adds up the splits.

    Sums are in fp32 and in a fixed order.

    Args:
        problem: One that `wgrad_supported` accepts, with at least one sample.
        dy: (B, C_out, OH, OW) in channels_last memory.
        t: x and x2 in channels_last memory; offsets, weight_index and widths contiguous; the others are not used.
        dweight: (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in, or None.
        dbias: (E, C_out), or None.
        dsample_bias: (B, C_out), or None.
        tile: Overrides the choice (benches and tests).
        splits: Overrides the chosen number of splits of the pixels.
    """
    for launch in wgrad_launches(problem, dy, t, dweight, dbias, dsample_bias, tile, splits):
        launch.run()


def wgrad_supported(problem: ConvProblem) -> str | None:
    """None, or why the kernel cannot serve a problem whose forward is served."""
    pixels = problem.batch * max(problem.out_height * problem.out_width, problem.height * problem.width)
    if pixels >= 2**30:
        return f"it counts pixels with 32 bits: {pixels} in a batch are too many"
    step_images = 2 + 64 // (problem.out_height * problem.out_width)  # the most that the pixels of one step belong to
    if step_images * problem.height * problem.width * problem.in_channels >= 2**31:
        return "it indexes the images of one step with 32 bits: 2**31 elements are too many"
    if problem.out_channels * problem.in_channels * problem.filter[0] * problem.filter[1] >= 2**31:
        return "it indexes the weight of one expert with 32 bits: 2**31 elements are too many"
    return None
