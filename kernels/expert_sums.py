"""Sums over the samples of each expert: values per sample (B, C) fp32 become values per expert (E, C).

The order is fixed: groups ascending, and within a group chunks of samples ascending. Where samples are few, the kernel
that makes the values adds them up as well: the last of an expert's programs to arrive at a counter does it, which
leaves the counter at zero. Otherwise `sum_per_expert` is a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels.launch import Launch

MAX_AT_ONCE = 256  # of more samples, which may all be one expert's, a program takes longer for the sums than a launch
_BLOCK_SAMPLES = tl.constexpr(8)
_BLOCK_CHANNELS = 128
_INTEGERS = ("batch", "channels", "num_groups", "num_experts")


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
def my_groups(weight_index, expert, num_groups, num_experts, GROUPS: tl.constexpr):
    """The numbers of all groups, and which of them use an expert: [GROUPS] each."""
    number = tl.arange(0, GROUPS)
    exists = number < num_groups
    named = tl.load(weight_index + number, mask=exists, other=0)
    return number, exists & (tl.minimum(tl.maximum(named, 0), num_experts - 1) == expert)


@triton.jit
def next_group(number, mine, group, GROUPS: tl.constexpr):
    """The first of an expert's groups after `group`."""
    return tl.min(tl.where(mine & (number > group), number, GROUPS), 0)


@triton.jit
def sum_samples(partial, number, mine, columns, there, channels, batch, offsets, GROUPS: tl.constexpr):
    """Sums partial (B, C) over the samples of the groups that are `mine`, in columns [BC] that are `there`: [BC]."""
    rows = tl.arange(0, _BLOCK_SAMPLES)
    total = tl.zeros([_BLOCK_SAMPLES, columns.shape[0]], tl.float32)
    group = -1
    for _ in range(tl.sum(mine.to(tl.int32), 0)):
        group = next_group(number, mine, group, GROUPS)
        first, past = segment_of(offsets, group, batch)
        for start in range(first, past, _BLOCK_SAMPLES):
            sample = (start + rows)[:, None]  # [BB, 1]
            live = (sample < past) & there[None, :]
            total += tl.load(partial + sample.to(tl.int64) * channels + columns[None, :], mask=live, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def count_samples(number, mine, batch, offsets, num_groups):
    """The samples of the groups that are `mine`."""
    exists = number < num_groups
    first = tl.minimum(tl.maximum(tl.load(offsets + number, mask=exists, other=0), 0), batch)
    past = tl.minimum(tl.maximum(tl.load(offsets + number + 1, mask=exists, other=0), first), batch)
    return tl.sum(tl.where(mine, past - first, 0), 0)


@triton.jit
def arrive(counter):
    """Counts this program; returns how many came before it. What it stored is seen by those that come after it."""
    tl.debug_barrier()  # the counter is changed by one thread, after the stores of all
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def zero_unused(
    out, columns, there, channels, batch, offsets, weight_index, num_groups, num_experts, GROUPS: tl.constexpr
):
    """Stores zeros for experts without samples to out (E, C); the programs of each sample do it for some experts."""
    for expert in range(tl.program_id(0), num_experts, batch):
        number, mine = my_groups(weight_index, expert, num_groups, num_experts, GROUPS)
        if count_samples(number, mine, batch, offsets, num_groups) == 0:
            zeros = tl.zeros_like(columns).to(out.dtype.element_ty)
            tl.store(out + tl.cast(expert, tl.int64) * channels + columns, zeros, mask=there)


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
    num_experts,
    GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Sums one or two partials: program expert, block of channels."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)  # [BC]
    there = columns < channels
    place = expert.to(tl.int64) * channels + columns
    number, mine = my_groups(weight_index, expert, num_groups, num_experts, GROUPS)
    total = sum_samples(first_partial, number, mine, columns, there, channels, batch, offsets, GROUPS)
    tl.store(first_out + place, total.to(first_out.dtype.element_ty), mask=there)
    if second_partial is not None:
        total = sum_samples(second_partial, number, mine, columns, there, channels, batch, offsets, GROUPS)
        tl.store(second_out + place, total.to(second_out.dtype.element_ty), mask=there)


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
        "num_experts": num_experts,
        "GROUPS": triton.next_power_of_2(weight_index.shape[0]),
        "BLOCK_CHANNELS": _BLOCK_CHANNELS,
    }
    grid = (num_experts, triton.cdiv(channels, _BLOCK_CHANNELS))
    key = (outs[0].device, outs[0].dtype, *constants.values())
    Launch(sum_per_expert_kernel, grid, tensors, constants, {"num_warps": 4}, key).run()
