"""Sums that are divided into equal shares, the splits: which steps a share has, and adding up the shares' sums.

A program that computes one of several shares stores an fp32 partial; one launch then adds the partials of all results
in ascending order of the splits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from tdc_fast.kernels.launch import Launch

_BLOCK = 1024


@triton.jit
def share_start(steps, split, splits):
    """First step of a share; the first shares get the remainder. No product: steps * splits may not fit 32 bits."""
    return steps // splits * split + tl.minimum(steps % splits, split)


@triton.jit
def _add_up(partial, out, elements, splits, block, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Sums partial (splits, elements) over the splits for one block of elements. VECTOR divides elements."""
    elements = (elements // VECTOR) * VECTOR
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * elements.to(tl.int64) + place, mask=place < elements, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < elements)


@triton.jit(do_not_specialize=("first_elements", "second_elements", "splits"))
def sum_splits_kernel(
    first_partial,  # (splits, first_elements) fp32
    first_out,
    first_elements,
    second_partial,  # (splits, second_elements) fp32, or None
    second_out,
    second_elements,
    splits,
    FIRST_VECTOR: tl.constexpr,  # divides first_elements: a masked load may access this many at once
    SECOND_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the splits of one or two results: program block of the first, then of the second."""
    program = tl.program_id(0)
    blocks = tl.cdiv(first_elements, BLOCK)
    if second_partial is None:
        _add_up(first_partial, first_out, first_elements, splits, program, FIRST_VECTOR, BLOCK)
    else:
        if program < blocks:
            _add_up(first_partial, first_out, first_elements, splits, program, FIRST_VECTOR, BLOCK)
        else:
            _add_up(second_partial, second_out, second_elements, splits, program - blocks, SECOND_VECTOR, BLOCK)


def sum_splits_launch(partials: Sequence[Tensor], outs: Sequence[Tensor], key: Hashable) -> Launch:
    """The launch that adds up the splits of one or two results.

    Args:
        partials: (splits, ...) fp32 each, contiguous.
        outs: written; the elements of each lie in memory as those of a split.
        key: differs where the shapes, the number of splits or the dtype differ.
    """
    (first, *second), (first_out, *second_out) = partials, outs
    sizes = [out.numel() for out in outs]
    tensors = {
        "first_partial": first,
        "first_out": first_out,
        "second_partial": second[0] if second else None,
        "second_out": second_out[0] if second_out else None,
    }
    constants = {
        "first_elements": sizes[0],
        "second_elements": sum(sizes[1:]),
        "splits": first.shape[0],
        "FIRST_VECTOR": widest_access(sizes[0], first.element_size()),
        "SECOND_VECTOR": widest_access(sum(sizes[1:]), first.element_size()),
        "BLOCK": _BLOCK,
    }
    grid = (sum(triton.cdiv(size, _BLOCK) for size in sizes),)
    return Launch(sum_splits_kernel, grid, tensors, constants, {"num_warps": 4}, key)


def widest_access(elements: int, itemsize: int) -> int:
    """The largest number of elements, up to 16 bytes, that divides `elements`."""
    vector = 16 // itemsize
    while elements % vector:
        vector //= 2
    return vector
