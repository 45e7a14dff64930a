"""Launches of the emulator's own test kernels of Hopper's units (csrc/emulator/self_test_sm90_kernels.cuh)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.emulator.harness import emulated


def tensor_map(tensor: Tensor, box: Sequence[int]) -> bytes:
    """A TensorMap (csrc/cuda/tensor_map.h) of a tensor and boxes of it, sizes from the innermost dimension on."""
    sizes, strides = list(reversed(tensor.shape)), [2 * stride for stride in reversed(tensor.stride())]
    ones = 5 - len(sizes)
    return struct.pack(
        "=5Q10I2i5Q",
        tensor.data_ptr(),
        *strides[1:],
        *[0] * ones,
        *sizes,
        *[1] * ones,
        *box,
        *[1] * ones,
        len(sizes),
        int(tensor.dtype == torch.float16),
        *[0] * 5,
    )


def swizzled(rows: Tensor, window: int = 0) -> Tensor:
    """Rows (R, 64) of 16-bit elements as they lie in shared memory from a window address on, a multiple of 128."""
    chunks = rows.reshape(-1, 8, 8)
    number = torch.arange(chunks.shape[0]) + window // 128
    place = torch.arange(8)[None] ^ (number % 8)[:, None]
    out = torch.empty_like(chunks)
    out[torch.arange(chunks.shape[0])[:, None], place] = chunks
    return out.reshape(rows.shape)


def box_of(tensor: Tensor, box: Sequence[int], at: Sequence[int]) -> Tensor:
    """The elements of a box (extents and place from the innermost dimension on), zeros outside; rows of 64."""
    out = torch.zeros(*reversed(box), dtype=tensor.dtype)
    inner, outer = [], []
    for size, extent, start in zip(reversed(tensor.shape), box, at, strict=True):
        first, last = max(start, 0), min(start + extent, size)
        outer.append(slice(first, max(first, last)))
        inner.append(slice(first - start, max(first, last) - start))
    out[tuple(reversed(inner))] = tensor[tuple(reversed(outer))]
    return out.reshape(-1, box[0])


_FIELDS = ("boxes_b", "distance_b", "start_a", "start_b", "leading_a", "leading_b")
_FIELDS += ("stride_a", "stride_b", "step_a", "step_b", "count", "mode")


def run(
    kernel: str,
    a: bytes,
    b: bytes,
    out: Tensor | None = None,
    *,
    at: Sequence[int] = (),
    threads: int = 32,
    shared: int = 1 << 17,
    schedule: int = 0,
    **fields: int,
) -> None:
    """Runs `self_test_<kernel>`; the fields are those of HopperTestParams, 0 by default."""
    numbers = [*at, *[0] * (5 - len(at)), *(fields.pop(name, 0) for name in _FIELDS)]
    assert not fields, fields
    params = a + b + struct.pack("=Q17i", 0 if out is None else out.data_ptr(), *numbers)
    params += bytes(-len(params) % 64)
    emulated("self_test_sm90").launch(f"self_test_{kernel}", (1, 1, 1), threads, shared, params, schedule)


def pipeline(a: Tensor, b: Tensor, schedule: int = 0, bug: int = 0) -> Tensor:
    """y (2, 64, 64) = a (64, K) b (64, K)^T and its double, through TMA, wgmma and the ring of stages."""
    y = torch.full((2, 64, 64), torch.nan, dtype=a.dtype)
    maps = tensor_map(a[None], (64, 64, 1)) + tensor_map(b[None], (64, 64, 1)) + tensor_map(y, (64, 16, 1))
    params = maps + struct.pack("=2i", a.shape[1] // 64, bug)
    params += bytes(-len(params) % 64)
    emulated("self_test_sm90").launch("self_test_pipeline", (1, 1, 1), 384, 2 * 16384 + 4 * 2048, params, schedule)
    return y
