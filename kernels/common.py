"""What every Triton kernel of a routed operator shares: the tile table, widths, the product, the tap arithmetic.

Widths and expert indices come from the caller's tensors: they are clamped to what may be indexed, whatever they hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter multiplies the raw bits of bf16 operands: there, products are taken in fp32.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def load_tile_row(tiles, row):
    """Row of the tile table -> (group or -1, first sorted sample, number of samples)."""
    entry = tiles + row * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def live_width(widths, group, channels):
    """Live channels of a group: all of them without widths."""
    return channels if widths is None else tl.minimum(tl.maximum(tl.load(widths + group), 0), channels)


@triton.jit
def expert_of(weight_index, group, num_experts):
    return tl.minimum(tl.maximum(tl.load(weight_index + group), 0), num_experts - 1)


@triton.jit
def _nearest_tf32(value):
    """fp32 rounded to tf32: a product alone would cut the low bits off, which errs to one side."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] fp32 + a [M, K] @ b [K, N]; PRECISION concerns fp32 operands: "ieee" or "tf32"."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    elif PRECISION == "tf32":
        a = _nearest_tf32(a)
        b = _nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def axis_taps(parity, padding, FILTER: tl.constexpr, STRIDE: tl.constexpr, DGRAD: tl.constexpr):
    """How one axis walks its taps: (number of taps, first tap, first source coordinate relative to the grid's).

    Forward: output g reads source g * STRIDE - padding + j through tap j.
    Dgrad: a program serves the pixels STRIDE * g + parity, which only every STRIDE-th tap reaches: the j-th of them is
    tap first + STRIDE * j, and it comes from dy at g + base - j. No product is wasted on taps that do not reach.
    """
    if DGRAD:
        first = (parity + padding) % STRIDE
        taps = (FILTER - first + STRIDE - 1) // STRIDE
        base = (parity + padding) // STRIDE
    else:
        first = 0
        taps = FILTER
        base = -padding
    return taps, first, base


@triton.jit
def halves(acc):
    """[M, N] -> its left and right halves, in registers: an epilogue by halves needs half as many of them."""
    return tl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def finish_tile(
    acc,  # [BN, BM] fp32
    out,
    bias,
    sample_bias,
    residual,
    expert,
    first,  # first sample of the tile
    sample,  # [BM] sample within the tile
    pixel,  # [BM] pixel of the output image
    valid,  # [BM]
    columns,  # [BN] output channels
    live,  # live output channels
    channels,
    pixels,  # of an output image
):
    """Adds what there is to add in fp32 and stores the tile to NHWC memory; dead channels become exact zeros."""
    value = tl.trans(acc)  # [BM, BN]
    # Masked by the channels there are, not by the live ones, whose number has no known alignment: loads stay wide.
    there = columns < channels
    inside = valid[:, None] & there[None, :]
    begin = first.to(tl.int64)
    if bias is not None:
        row = bias + expert.to(tl.int64) * channels
        value += tl.load(row + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    if sample_bias is not None:
        rows = sample_bias + begin * channels + (sample * channels)[:, None] + columns[None, :]
        value += tl.load(rows, mask=inside, other=0.0).to(tl.float32)
    start = begin * (pixels * channels)
    place = ((sample * pixels + pixel) * channels)[:, None] + columns[None, :]  # [BM, BN]
    if residual is not None:
        value += tl.load(residual + start + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where((columns < live)[None, :], value, 0.0)
    tl.store(out + start + place, value.to(out.dtype.element_ty), mask=inside)
