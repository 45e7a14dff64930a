"""Routed convolution, gradient of the weights: arguments and launches of the kernels in wgrad_kernels.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels import wgrad_tiles
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.tile_shapes import device_of, precision_of
from tdc_fast.kernels.wgrad_kernels import sum_splits_kernel, wgrad_kernel
from tdc_fast.kernels.wgrad_tiles import WgradTile

_SUM_BLOCK = 1024


@functools.lru_cache(maxsize=4096)
def _constants(
    p: ConvProblem, tile: WgradTile, splits: int, in_widths: bool, out_widths: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """(grid, the arguments that are not tensors)."""
    rows, columns = wgrad_tiles.pixel_box(tile, p) if tile.path == "tma" else (1, tile.block_pixels)
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
        # Half of a smaller tile would not fill wgmma's 64 rows.
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
    """The largest number of channels, up to 16 bytes, that divides `channels`."""
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
    problem: ConvProblem,
    dy: Tensor,
    t: ConvTensors,
    dweight: Tensor,
    tile: WgradTile | None = None,
    splits: int | None = None,
) -> list[Launch]:
    """The launches of `conv_wgrad`, computed from shapes alone; compile-only tests read their arguments."""
    x = t.x
    if tile is None:
        aligned = dy.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
        tile = wgrad_tiles.choose_wgrad_tile(problem, device_of(problem.device), None if aligned else "pointer")
    if splits is None:
        splits = wgrad_tiles.choose_splits(problem, tile, device_of(problem.device))
    grid, constants = _constants(problem, tile, splits, t.in_widths is not None, t.out_widths is not None)
    out = dweight
    if splits > 1:
        out = torch.empty((splits, dweight.numel()), dtype=torch.float32, device=dweight.device)
    tensors: dict[str, Tensor | TensorDescriptor | None] = {
        "dy": dy,
        "x": x,
        "narrow_dy": dy if constants["NARROW_OUT"] else None,
        "narrow_x": x if constants["NARROW_IN"] else None,
        "out": out,
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
    key, options = (problem, tile, splits), {"num_warps": tile.warps, "num_stages": tile.stages}
    launches = [Launch(wgrad_kernel, grid, tensors, constants, options, key)]
    if splits > 1:
        elements = dweight.numel()
        sums = {"elements": elements, "splits": splits, "BLOCK": _SUM_BLOCK, "VECTOR": _vector(elements, itemsize=4)}
        sum_grid, shares = (triton.cdiv(elements, _SUM_BLOCK),), {"partial": out, "out": dweight}
        launches.append(Launch(sum_splits_kernel, sum_grid, shares, sums, {"num_warps": 4}, key))
    return launches


def conv_wgrad(
    problem: ConvProblem,
    dy: Tensor,
    t: ConvTensors,
    dweight: Tensor,
    *,
    tile: WgradTile | None = None,
    splits: int | None = None,
) -> None:
    """Writes every element of dweight in one launch or two; sums are in fp32 and in a fixed order.

    Args:
        problem: One that `wgrad_supported` accepts, with at least one sample.
        dy: (B, C_out, OH, OW) in channels_last memory.
        t: x in channels_last memory; offsets, weight_index and widths contiguous; the others are not used.
        dweight: (E, C_out, C_in, R, S) in memory order E, C_out, R, S, C_in.
        tile: Overrides the choice (benches and tests).
        splits: Overrides the chosen number of splits of the pixels.
    """
    for launch in wgrad_launches(problem, dy, t, dweight, tile, splits):
        launch.run()


def wgrad_supported(problem: ConvProblem) -> str | None:
    """None, or why the kernel cannot serve a problem whose forward is served."""
    pixels = problem.batch * max(problem.out_height * problem.out_width, problem.height * problem.width)
    if pixels >= 2**30:
        return f"it counts pixels with 32 bits: {pixels} in a batch are too many"
    step_images = 2 + 64 // (problem.out_height * problem.out_width)  # the most that the pixels of one step belong to
    if step_images * problem.height * problem.width * problem.in_channels >= 2**31:
        return "it indexes the images of one step with 32 bits: 2**31 elements are too many"
    if problem.num_experts * problem.out_channels * problem.filter[0] * problem.filter[1] >= 2**31:
        return "it counts the filters of all experts with 32 bits: 2**31 are too many"
    return None
