"""Device code of the routed group norm: a program computes one sample's block of whole norm groups.

It walks the image in tiles of [BLOCK_PIXELS, BLOCK_CHANNELS]; each element of the tile keeps its own running sums. They
are combined once, at the end: pixels by a tree, then channels into norm groups through a small membership matrix. The
image is read twice, the second time from the cache.

    pixels |  tile 0  | c0 .. c1 |        running mean and M2 of every element (Welford)
           |  tile 1  | c0 .. c1 |   ->   norm group: mean   ->   M2 about that mean: rstd
           |   ...    | c0 .. c1 |        second walk: (x - mean) * rstd, affine, scale, shift, SiLU
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tdc_fast.kernels.common import expert_of, live_width
from tdc_fast.kernels.expert_sums import (
    arrive,
    count_samples,
    group_of_sample,
    my_groups,
    sum_samples,
    zero_unused,
)

_INTEGERS = (
    "channels",
    "x2_channels",
    "pixels",
    "per_group",
    "span",
    "norm_groups",
    "num_groups",
    "num_experts",
    "eps",
)


@triton.jit
def _affine_rows(weight, bias, scale, shift, expert, sample, columns, channels, live):
    """Loads [BC] fp32 each, 0 where dead: the expert's weight and bias, 1 + the sample's scale, its shift."""
    place = expert.to(tl.int64) * channels + columns
    gain = tl.load(weight + place, mask=live, other=0.0).to(tl.float32)
    offset = tl.load(bias + place, mask=live, other=0.0).to(tl.float32)
    place = sample.to(tl.int64) * channels + columns
    factor = tl.zeros_like(gain) + 1.0
    if scale is not None:
        factor += tl.load(scale + place, mask=live, other=0.0).to(tl.float32)
    addend = tl.zeros_like(gain)
    if shift is not None:
        addend += tl.load(shift + place, mask=live, other=0.0).to(tl.float32)
    return gain, offset, factor, addend


@triton.jit
def _group_sums(values, member):
    """Sums values [BC] over the channels of each norm group: [BG]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def _of_channels(values, member):
    """Spreads values [BG] of norm groups to their channels: [BC]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _block(span, per_group, channels, VECTOR: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """This program's channels: (first, column [BC] from there, inside the block [BC], member of a norm group [BG, BC]).

    VECTOR divides channels and span; the compiler has to see that to keep a thread's masked load one 16-byte access.
    """
    first = tl.program_id(1) * ((span // VECTOR) * VECTOR)
    size = tl.minimum((span // VECTOR) * VECTOR, ((channels - first) // VECTOR) * VECTOR)
    column = tl.arange(0, BLOCK_CHANNELS)
    inside = column < size
    member = (column // per_group)[None, :] == tl.arange(0, BLOCK_GROUPS)[:, None]
    return first, column, inside, member & inside[None, :]


class Tile(NamedTuple):
    """Where a tile is in the input, or in its gradient: channels before the seam are in x, those from it on in x2."""

    x: Any  # (B, pixels, seam)
    x2: Any  # (B, pixels, channels - seam) or None
    channels: Any
    seam: Any
    first: Any  # channel of the block
    column: Any  # [BC]
    row: Any  # [BP]


@triton.jit
def _places(tensor, begin):
    """Addresses of the tile [BP, BC]. begin: its first pixel among those of the whole batch."""
    row, column = tensor.row[:, None], tensor.column[None, :]
    if tensor.x2 is None:
        places = tensor.x + (begin * tensor.channels + tensor.first) + (row * tensor.channels + column)
    else:
        # One access: a thread's vector of channels lies on one side of the seam.
        seam, width, channel = tensor.seam, tensor.channels - tensor.seam, tensor.first + column
        in_x = channel < seam
        columns = tl.where(in_x, tensor.x + channel, tensor.x2 + (channel - seam))
        stride = tl.where(in_x, seam, width)
        places = columns + begin * stride + row * stride
    return places


@triton.jit
def _read(tensor, begin, mask):
    """Loads the tile as fp32, 0 outside the mask."""
    return tl.load(_places(tensor, begin), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, begin, value, mask):
    """Stores the tile."""
    tl.store(_places(tensor, begin), value.to(tensor.x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_INTEGERS)
def norm_forward_kernel(
    x,  # (B, pixels, C), or with x2 (B, pixels, C - x2_channels)
    x2,  # (B, pixels, x2_channels) or None
    weight,  # (E, C)
    bias,  # (E, C)
    scale,  # (B, C) or None
    shift,  # (B, C) or None
    y,  # (B, pixels, C)
    mean,  # (B, norm groups) fp32
    rstd,  # (B, norm groups) fp32
    counters,  # (E, norm groups) int32, filled with zeros for the backward
    offsets,
    weight_index,
    widths,
    channels,
    x2_channels,
    pixels,
    per_group,  # channels of a norm group
    span,  # channels of a program
    norm_groups,
    num_groups,
    num_experts,
    eps,
    SILU: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Normalises one block: program sample, block of norm groups."""
    sample = tl.program_id(0)
    group = group_of_sample(offsets, sample, num_groups, GROUPS)
    expert = expert_of(weight_index, group, num_experts)
    first, column, inside, member = _block(span, per_group, channels, VECTOR, BLOCK_GROUPS, BLOCK_CHANNELS)
    live = inside & (first + column < live_width(widths, group, channels))
    if sample + tl.program_id(1) == 0:
        for begin in range(0, num_experts * norm_groups, BLOCK_CHANNELS):
            place = begin + column
            tl.store(counters + place, tl.zeros_like(place), mask=place < num_experts * norm_groups)
    row = tl.arange(0, BLOCK_PIXELS)
    stride = (channels // VECTOR) * VECTOR
    seam = stride - (x2_channels // VECTOR) * VECTOR
    source = Tile(x=x, x2=x2, channels=stride, seam=seam, first=first, column=column, row=row)
    start = sample.to(tl.int64) * pixels
    result = Tile(x=y, x2=None, channels=stride, seam=stride, first=first, column=column, row=row)

    running = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    spread = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    seen = 0.0
    for pixel in range(0, pixels, BLOCK_PIXELS):
        valid = (row < pixels - pixel)[:, None]
        value = _read(source, start + pixel, valid & inside[None, :])
        value = tl.where(live[None, :], value, 0.0)
        seen += 1.0
        delta = tl.where(valid, value - running, 0.0)
        running += delta / seen
        spread += delta * tl.where(valid, value - running, 0.0)
    count = ((pixels - row + BLOCK_PIXELS - 1) // BLOCK_PIXELS).to(tl.float32)[:, None]  # pixels seen by each row
    # The mean is kept as pivot + excess: where it is far larger than the deviation, one fp32 number is too coarse.
    elements = per_group * pixels.to(tl.float32)
    pivot = _group_sums(tl.sum(running * count, 0), member) / elements  # [BG]
    away = running - _of_channels(pivot, member)[None, :]
    excess = _group_sums(tl.sum(away * count, 0), member) / elements  # [BG]
    away -= _of_channels(excess, member)[None, :]
    channel_spread = tl.sum(spread + tl.where(count > 0, away * away * count, 0.0), 0)  # [BC]
    variance = _group_sums(channel_spread, member) / elements
    group_live = _group_sums(tl.where(live, 1.0, 0.0), member) > 0.0
    group_rstd = tl.where(group_live, 1.0 / tl.sqrt(variance + eps), 0.0)

    norm_group = first // per_group + tl.arange(0, BLOCK_GROUPS)
    place = sample.to(tl.int64) * norm_groups + norm_group
    owned = (tl.arange(0, BLOCK_GROUPS) < span // per_group) & (norm_group < norm_groups)
    tl.store(mean + place, pivot + excess, mask=owned)
    tl.store(rstd + place, group_rstd, mask=owned)

    gain, offset, factor, addend = _affine_rows(
        weight, bias, scale, shift, expert, sample, first + column, channels, live
    )
    center, rest = _of_channels(pivot, member)[None, :], _of_channels(excess, member)[None, :]
    slope = (_of_channels(group_rstd, member) * gain * factor)[None, :]
    base = (offset * factor + addend)[None, :]
    for pixel in range(0, pixels, BLOCK_PIXELS):
        mask = (row < pixels - pixel)[:, None] & inside[None, :]
        value = _read(source, start + pixel, mask)
        value = (value - center - rest) * slope + base
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        value = tl.where(live[None, :], value, 0.0)
        _write(result, start + pixel, value, mask)


@triton.jit
def _upstream(dy, value, center, inverse, slope, base, live, SILU: tl.constexpr):
    """The gradient before the activation and the normalised input, [BP, BC] each; 0 where dead."""
    normal = tl.where(live[None, :], (value - center) * inverse, 0.0)
    grad = tl.where(live[None, :], dy, 0.0)
    if SILU:
        before = normal * slope + base
        sigmoid = 1.0 / (1.0 + tl.exp(-before))
        grad = grad * sigmoid * (1.0 + before * (1.0 - sigmoid))
    return grad, normal


@triton.jit(do_not_specialize=_INTEGERS)
def norm_backward_kernel(
    dy,  # (B, pixels, C)
    x,  # (B, pixels, C), or with x2 (B, pixels, C - x2_channels)
    x2,  # (B, pixels, x2_channels) or None
    weight,  # (E, C)
    bias,  # (E, C)
    scale,  # (B, C) or None
    shift,  # (B, C) or None
    mean,  # (B, norm groups) fp32
    rstd,  # (B, norm groups) fp32
    dx,  # like x, or None
    dx2,  # like x2; None with dx
    dscale,  # (B, C) or None
    dshift,  # (B, C) or None
    dweight_share,  # (B, C) fp32, of each sample, or None
    dbias_share,  # (B, C) fp32, of each sample, or None
    dweight,  # (E, C), or None: the shares are summed by a launch of their own
    dbias,  # (E, C), likewise
    counters,  # (E, norm groups) int32, zeros; None with dweight and dbias
    offsets,
    weight_index,
    widths,
    channels,
    x2_channels,
    pixels,
    per_group,
    span,
    norm_groups,
    num_groups,
    num_experts,
    SILU: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Computes the gradients of one block: program sample, block of norm groups."""
    sample = tl.program_id(0)
    group = group_of_sample(offsets, sample, num_groups, GROUPS)
    expert = expert_of(weight_index, group, num_experts)
    first, column, inside, member = _block(span, per_group, channels, VECTOR, BLOCK_GROUPS, BLOCK_CHANNELS)
    live = inside & (first + column < live_width(widths, group, channels))
    row = tl.arange(0, BLOCK_PIXELS)
    stride = (channels // VECTOR) * VECTOR
    seam = stride - (x2_channels // VECTOR) * VECTOR
    source = Tile(x=x, x2=x2, channels=stride, seam=seam, first=first, column=column, row=row)
    start = sample.to(tl.int64) * pixels
    above = Tile(x=dy, x2=None, channels=stride, seam=stride, first=first, column=column, row=row)
    gain, offset, factor, addend = _affine_rows(
        weight, bias, scale, shift, expert, sample, first + column, channels, live
    )
    place = sample.to(tl.int64) * norm_groups + (first + column) // per_group
    center = tl.load(mean + place, mask=live, other=0.0)[None, :]
    inverse = tl.load(rstd + place, mask=live, other=0.0)[None, :]
    slope = (gain * factor)[None, :]  # of the normalised input, before the activation
    base = (offset * factor + addend)[None, :]

    grads = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    products = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for pixel in range(0, pixels, BLOCK_PIXELS):
        mask = (row < pixels - pixel)[:, None] & inside[None, :]
        value = _read(source, start + pixel, mask)
        grad, normal = _upstream(_read(above, start + pixel, mask), value, center, inverse, slope, base, live, SILU)
        grads += grad
        products += grad * normal
    sum_grad = tl.sum(grads, 0)  # [BC]
    sum_product = tl.sum(products, 0)

    place = sample.to(tl.int64) * channels + first + column
    if dscale is not None:
        sum_affine = sum_product * gain + sum_grad * offset
        tl.store(dscale + place, sum_affine.to(dscale.dtype.element_ty), mask=inside)
    if dshift is not None:
        tl.store(dshift + place, sum_grad.to(dshift.dtype.element_ty), mask=inside)
    if dweight_share is not None:
        tl.store(dweight_share + place, sum_product * factor, mask=inside)
    if dbias_share is not None:
        tl.store(dbias_share + place, sum_grad * factor, mask=inside)
    if counters is not None:
        # The gradient of the input, which follows, hides how long the counter takes.
        counter = counters + (expert.to(tl.int64) * norm_groups + tl.program_id(1))
        arrived = arrive(counter)
    if dx is not None:
        to = Tile(x=dx, x2=dx2, channels=stride, seam=seam, first=first, column=column, row=row)
        elements = per_group * pixels.to(tl.float32)
        mean_grad = _of_channels(_group_sums(sum_grad * gain * factor, member) / elements, member)[None, :]
        mean_product = _of_channels(_group_sums(sum_product * gain * factor, member) / elements, member)[None, :]
        for pixel in range(0, pixels, BLOCK_PIXELS):
            mask = (row < pixels - pixel)[:, None] & inside[None, :]
            value = _read(source, start + pixel, mask)
            grad, normal = _upstream(_read(above, start + pixel, mask), value, center, inverse, slope, base, live, SILU)
            value = inverse * (grad * slope - mean_grad - normal * mean_product)
            value = tl.where(live[None, :], value, 0.0)
            _write(to, start + pixel, value, mask)
    if counters is not None:
        batch = tl.num_programs(0)
        columns = first + column
        number, mine = my_groups(weight_index, expert, num_groups, num_experts, GROUPS)
        if dweight is not None:
            zero_unused(
                dweight, columns, inside, channels, batch, offsets, weight_index, num_groups, num_experts, GROUPS
            )
        if dbias is not None:
            zero_unused(dbias, columns, inside, channels, batch, offsets, weight_index, num_groups, num_experts, GROUPS)
        if arrived == count_samples(number, mine, batch, offsets, num_groups) - 1:  # the expert's last program
            tl.store(counter, 0)
            place = expert.to(tl.int64) * channels + columns
            if dweight is not None:
                total = sum_samples(dweight_share, number, mine, columns, inside, channels, batch, offsets, GROUPS)
                tl.store(dweight + place, total.to(dweight.dtype.element_ty), mask=inside)
            if dbias is not None:
                total = sum_samples(dbias_share, number, mine, columns, inside, channels, batch, offsets, GROUPS)
                tl.store(dbias + place, total.to(dbias.dtype.element_ty), mask=inside)
