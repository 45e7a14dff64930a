"""Device code that the Triton kernels share: tile table, widths, products, taps, and the convolution's epilogue.

Widths and expert indices come from the caller's tensors, so they are clamped to the valid range before use.

Helpers with many arguments take named tuples. Build these with keywords: Triton's cache of compiled kernels is keyed by
the source of the jit functions, which does not show a change in the order of a tuple's fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Triton's interpreter multiplies the raw bits of bf16 operands: convert them to fp32 there.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


class Image(NamedTuple):
    """An NHWC tensor in memory, or two that hold its channels: those from the seam on are in the second."""

    pointer: Any
    pointer2: Any  # or None
    height: Any
    width: Any
    channels: Any
    seam: Any


class Output(NamedTuple):
    """Where a convolution's epilogue stores: an NHWC tensor, or two as in `Image`."""

    pointer: Any
    pointer2: Any  # or None
    pixels: Any  # of one image
    channels: Any
    seam: Any


class Addends(NamedTuple):
    """What a convolution's epilogue adds; each may be None."""

    bias: Any  # (E, C_out)
    sample_bias: Any  # (B, C_out)
    residual: Any  # like the output


class Samples(NamedTuple):
    """The samples of a tile, all of one group, and the group's widths."""

    expert: Any
    first: Any
    count: Any
    live: Any  # source channels to multiply; 0 where the whole tile is dead
    out_live: Any  # live output channels


class Taps(NamedTuple):
    """The taps that a program walks along one axis."""

    count: Any
    first: Any
    base: Any  # source coordinate of the first tap, relative to the grid's coordinate


@triton.jit
def load_tile_row(tiles, row):
    """Reads one row of the tile table: (group or -1, first sorted sample, number of samples)."""
    entry = tiles + row * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def live_width(widths, group, channels):
    """Live channels of a group; all of them if there are no widths."""
    return channels if widths is None else tl.minimum(tl.maximum(tl.load(widths + group), 0), channels)


@triton.jit
def expert_of(weight_index, group, num_experts):
    """The expert of a group."""
    return tl.minimum(tl.maximum(tl.load(weight_index + group), 0), num_experts - 1)


@triton.jit
def _nearest_tf32(value):
    """Rounds fp32 to tf32. The tensor core alone would truncate, which biases the sums."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """Returns acc [M, N] fp32 + a [M, K] @ b [K, N]. PRECISION is for fp32 operands: "ieee" or "tf32"."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32":
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def axis_taps(parity, padding, FILTER: tl.constexpr, STRIDE: tl.constexpr, DGRAD: tl.constexpr):
    """The taps of one axis.

    Forward: output g reads source g * STRIDE - padding + j through tap j.
    Dgrad: a program computes the pixels STRIDE * g + parity, which only every STRIDE-th tap reaches: the j-th of them
    is tap first + STRIDE * j, and it reads dy at g + base - j. No product is spent on the other taps.
    """
    if DGRAD:
        first = (parity + padding) % STRIDE
        count = (FILTER - first + STRIDE - 1) // STRIDE
        base = (parity + padding) // STRIDE
    else:
        first = 0
        count = FILTER
        base = -padding
    return Taps(count=count, first=first, base=base)


@triton.jit
def halves(acc):
    """Splits acc [M, N] into its left and right halves: an epilogue by halves needs half as many registers."""
    return tl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def finish_tile(
    acc,  # [BN, BM] fp32
    output,
    addends,
    samples,
    sample,  # [BM] sample within the tile
    pixel,  # [BM] pixel of the output image
    valid,  # [BM]
    columns,  # [BN] output channels
):
    """Adds the addends in fp32 and stores the tile; dead channels become exact zeros."""
    channels, pixels = output.channels, output.pixels
    value = tl.trans(acc)  # [BM, BN]
    # Masked by the number of channels, not of live ones, whose alignment is unknown: loads stay wide.
    there = columns < channels
    inside = valid[:, None] & there[None, :]
    begin = samples.first.to(tl.int64)
    if addends.bias is not None:
        row = addends.bias + samples.expert.to(tl.int64) * channels
        value += tl.load(row + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    if addends.sample_bias is not None:
        rows = addends.sample_bias + begin * channels + (sample * channels)[:, None] + columns[None, :]
        value += tl.load(rows, mask=inside, other=0.0).to(tl.float32)
    start = begin * (pixels * channels)
    place = ((sample * pixels + pixel) * channels)[:, None] + columns[None, :]  # [BM, BN]
    if addends.residual is not None:
        value += tl.load(addends.residual + start + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where((columns < samples.out_live)[None, :], value, 0.0)
    if output.pointer2 is None:
        places = output.pointer + start + place
    else:
        seam = output.seam
        in_first = columns < seam
        stride = tl.where(in_first, seam, channels - seam)[None, :]
        bases = tl.where(in_first, output.pointer + columns, output.pointer2 + (columns - seam))[None, :]
        places = bases + begin * pixels * stride + (sample * pixels + pixel)[:, None] * stride
    tl.store(places, value.to(output.pointer.dtype.element_ty), mask=inside)
