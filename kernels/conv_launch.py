"""From a problem and a tile to the launch of a convolution kernel, forward or dgrad.

`conv_launch` depends on shapes alone, so nothing waits for the GPU. Compile-only tests read its arguments.
"""

from __future__ import annotations

import functools
from operator import ge
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.conv_pointer import conv_pointer_kernel
from tdc_fast.kernels.conv_tma import conv_tma_kernel, source_descriptor, weight_descriptor
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.tile_shapes import ConvTile
from tdc_fast.kernels.tile_table import level_start

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def conv_supported(problem: ConvProblem) -> str | None:
    """None, or why these kernels cannot run forward and dgrad of the problem."""
    if problem.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, not {problem.dtype}"
    if (reason := problem.refusal()) is not None:
        return reason
    if problem.upsample > 1:
        if problem.x2_channels or problem.stride != (1, 1) or any(map(ge, problem.padding, problem.filter)):
            return "it upsamples one input, at stride 1, with less padding than the filter has taps"
        problem = problem.adjoint()
    # Offsets within a tile are 32-bit; those of samples and experts are 64-bit.
    pixels = max((problem.height + 1) * (problem.width + 1), problem.out_height * problem.out_width)
    taps = problem.filter[0] * problem.filter[1]
    if (
        max(pixels, taps * min(problem.in_channels, problem.out_channels))
        * max(problem.in_channels, problem.out_channels)
        >= 2**31
    ):
        return "it indexes a sample and an expert with 32 bits: 2**31 elements are too many"
    return None


@functools.lru_cache(maxsize=4096)
def _constants(
    op: str, p: ConvProblem, tile: ConvTile, widths: bool, narrow: bool, dead_zeros: bool
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(grid, the arguments that are not tensors)."""
    grid = tile_shapes.pixel_grid(op, p)
    samples = tile_shapes.samples_per_tile(tile, *grid)
    chunks = tile_shapes.chunks_of(tile, *grid)
    dgrad = op == "dgrad"
    image, result = (p.height, p.width), (p.out_height, p.out_width)
    source_size, out_size = (result, image) if dgrad else (image, result)
    source_channels, out_channels = tile_shapes.source_channels(op, p), tile_shapes.output_channels(op, p)
    classes = tile_shapes.pixel_classes(op, p)
    halved = tile.path == "tma" and not dgrad and p.stride == (2, 2)
    # Past the last channel of a source a box of it holds zeros; halved, or read through pointers, the next pixel. In
    # dgrad the box of weights extends into the next expert's, which may hold NaN or infinity and have to be masked.
    bounded = tile.path == "tma" and not halved and not dgrad
    blocked = [source_channels] if dgrad else [p.in_channels - p.x2_channels, p.x2_channels]  # walked one by one
    whole = not any(channels % tile.block_k for channels in blocked)
    filled = (bounded or whole) and (dead_zeros or not widths)
    channel_tiles = -(-out_channels // tile.block_channels)
    constants: dict[str, Any] = {
        "source_channels": source_channels,
        "out_channels": out_channels,
        "x2_channels": p.x2_channels,
        "source_height": source_size[0],
        "source_width": source_size[1],
        "out_height": out_size[0],
        "out_width": out_size[1],
        "grid_height": grid[0],
        "grid_width": grid[1],
        "chunks": chunks,
        "pad_height": p.padding[0],
        "pad_width": p.padding[1],
        "num_experts": p.num_experts,
        "tile_row": level_start(p.batch, p.num_groups, samples),
        "R": p.filter[0],
        "S": p.filter[1],
        "STRIDE_H": p.stride[0],
        "STRIDE_W": p.stride[1],
        "DGRAD": dgrad,
        # The longer loop goes inside, because the inner one is pipelined. A flattened loop over taps and channels would
        # never drain the pipeline, but such loops have been miscompiled with 8 warps (pytorch issue 173068).
        "TAPS_INNER": p.filter[0] * p.filter[1] > 2 * classes,
        "NARROW": narrow,
        "FILLED": filled,
        "TAIL": not filled and (widths or not whole),
        "BN": tile.block_channels,
        "BK": tile.block_k,
    }
    if tile.path == "tma":
        _, rows, columns = tile_shapes.box_of(tile.block_pixels, *grid)
        constants |= {"NB": samples, "TH": rows, "TW": columns, "HALVED": halved}
        del constants["source_height"], constants["source_width"]
    else:
        constants |= {"BM": tile.block_pixels, "PRECISION": tile_shapes.precision_of(p)}
    programs = tile_shapes.grid_rows(p, samples) * chunks * channel_tiles
    return (programs, classes), constants


def conv_launch(
    op: str,
    problem: ConvProblem,
    source: Tensor,
    t: ConvTensors,
    out: Tensor,
    tile: ConvTile | None = None,
    out2: Tensor | None = None,
    *,
    epilogue: bool = True,
    dead_zeros: bool = True,
) -> Launch:
    """The launch of a convolution kernel.

    Args:
        op: "forward" or "dgrad".
        problem: One that `conv_supported` accepts.
        source: x in the forward, dy in dgrad.
        t: The other tensors.
        out: y in the forward, dx in dgrad.
        tile: Overrides the choice. Without it, memory that is not aligned to 16 bytes takes the pointer path, because a
            tensor map cannot address it.
        out2: dx2 in dgrad with two inputs.
        epilogue: Whether t's bias, sample_bias and residual are added.
        dead_zeros: Whether the source is zero past its widths, as x is. A gradient that a foreign layer wrote is not.
    """
    if op == "dgrad":
        source2, source_widths, out_widths = None, t.out_widths, t.in_widths
    else:
        source2, source_widths, out_widths = t.x2, t.in_widths, t.out_widths
    bias, sample_bias, residual = (t.bias, t.sample_bias, t.residual) if epilogue else (None, None, None)
    if tile is None:
        read = (source, t.weight) if source2 is None else (source, t.weight, source2)
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in read)
        device = tile_shapes.device_of(problem.device)
        tile = tile_shapes.choose_tile(op, problem, device, None if aligned else "pointer")
    # Half of a smaller tile would not fill wgmma's 64 rows.
    narrow = tile.block_channels >= 128 and out_widths is not None
    grid, constants = _constants(op, problem, tile, source_widths is not None, narrow, dead_zeros)
    tensors: dict[str, Tensor | TensorDescriptor | None] = {
        "source": source,
        "source2": source2,
        "weight": t.weight,
        "bias": bias,
        "sample_bias": sample_bias,
        "residual": residual,
        "out": out,
        "out2": out2,
        "tiles": t.tiles,
        "weight_index": t.weight_index,
        "source_widths": source_widths,
        "out_widths": out_widths,
    }
    kernel = conv_pointer_kernel
    if tile.path == "tma":
        kernel = conv_tma_kernel
        tensors["narrow_weight"] = None
        if problem.batch:
            tensors["source"] = source_descriptor(source, constants)
            if source2 is not None:
                tensors["source2"] = source_descriptor(source2, constants)
            tensors["weight"] = weight_descriptor(t.weight, constants, tile.block_channels)
            if narrow:
                tensors["narrow_weight"] = weight_descriptor(t.weight, constants, tile.block_channels // 2)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers < 255:
        options["maxnreg"] = tile.registers
    return Launch(kernel, grid, tensors, constants, options, key=(op, problem, tile, dead_zeros))
