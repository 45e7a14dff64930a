"""Sums over the samples of each expert: values per sample (B, C) fp32 become values per expert (E, C).

The order is fixed: groups ascending, and within a group chunks of samples ascending.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels.launch import Launch

_BLOCK_SAMPLES = 8
_BLOCK_CHANNELS = 128
_INTEGERS = ("batch", "channels", "num_groups")


@triton.jit
def group_of_sample(offsets, sample, num_groups, GROUPS: tl.constexpr):
    """The group of a sorted sample; GROUPS is the number of groups rounded up to a power of two."""
    group = tl.arange(0, GROUPS)
    past = tl.load(offsets + 1 + group, mask=group < num_groups, other=2147483647)
    return tl.minimum(tl.sum((past <= sample).to(tl.int32), 0), num_groups - 1)


@triton.jit
def segment_of(offsets, group, batch):
    """First sample of a group and the one past its last, clamped to the batch."""
    first = tl.minimum(tl.maximum(tl.load(offsets + group), 0), batch)
    past = tl.minimum(tl.maximum(tl.load(offsets + group + 1), first), batch)
    return first, past


@triton.jit
def _sum_samples(partial, expert, columns, channels, batch, offsets, weight_index, num_groups, BLOCK: tl.constexpr):
    """Sums partial (B, C) over the samples of every group of `expert`: [BC]."""
    rows = tl.arange(0, BLOCK)
    total = tl.zeros_like(columns).to(tl.float32)
    for group in range(num_groups):
        if tl.load(weight_index + group) == expert:
            first, past = segment_of(offsets, group, batch)
            for start in range(first, past, BLOCK):
                sample = (start + rows)[:, None]  # [BB, 1]
                live = (sample < past) & (columns < channels)[None, :]
                values = tl.load(partial + sample.to(tl.int64) * channels + columns[None, :], mask=live, other=0.0)
                total += tl.sum(values, 0)
    return total


@triton.jit(do_not_specialize=_INTEGERS)
def sum_per_expert_kernel(
    first_partial,  # (B, C) fp32
    second_partial,  # (B, C) fp32, or None
    first_out,  # (E, C)
    second_out,  # (E, C), or None
    offsets,
    weight_index,
    batch,
    channels,
    num_groups,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Sums one or two partials: program expert, block of channels."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)  # [BC]
    place = expert.to(tl.int64) * channels + columns
    routing = (offsets, weight_index, num_groups)
    total = _sum_samples(first_partial, expert, columns, channels, batch, *routing, BLOCK_SAMPLES)
    tl.store(first_out + place, total.to(first_out.dtype.element_ty), mask=columns < channels)
    if second_partial is not None:
        total = _sum_samples(second_partial, expert, columns, channels, batch, *routing, BLOCK_SAMPLES)
        tl.store(second_out + place, total.to(second_out.dtype.element_ty), mask=columns < channels)


def sum_per_expert(
    partials: tuple[Tensor, ...], outs: tuple[Tensor, ...], offsets: Tensor, weight_index: Tensor
) -> None:
    """Sums one or two partials over the samples of each expert, in one launch; experts without samples get zeros.

    Args:
        partials: One or two tensors (B, C) fp32, contiguous.
        outs: As many tensors (E, C), written.
        offsets: (N + 1,) int32.
        weight_index: (N,) int32.
    """
    num_experts, channels = outs[0].shape
    tensors = {
        "first_partial": partials[0],
        "second_partial": partials[1] if len(partials) > 1 else None,
        "first_out": outs[0],
        "second_out": outs[1] if len(outs) > 1 else None,
        "offsets": offsets,
        "weight_index": weight_index,
    }
    constants = {
        "batch": partials[0].shape[0],
        "channels": channels,
        "num_groups": weight_index.shape[0],
        "BLOCK_SAMPLES": _BLOCK_SAMPLES,
        "BLOCK_CHANNELS": _BLOCK_CHANNELS,
    }
    grid = (num_experts, triton.cdiv(channels, _BLOCK_CHANNELS))
    key = (outs[0].device, outs[0].dtype, num_experts, *constants.values())
    Launch(sum_per_expert_kernel, grid, tensors, constants, {"num_warps": 4}, key).run()
