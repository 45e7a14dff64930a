"""Launches of the test kernels of Hopper's units (csrc/emulator/self_test_sm90_kernels.cuh), in the emulator or, with
a machine of tests/gpu/units.py, on a GPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tests.emulator.harness import emulated


class Machine(Protocol):
    """What runs the kernels."""

    device: str  # where their tensors are

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        params: bytes,
        places: Sequence[int] = (),
    ) -> None:
        """Runs `self_test_<kernel>` to its end; places: of the tensor maps in its parameters."""


class Emulated:
    """The emulator, in a schedule."""

    device = "cpu"

    def __init__(self, schedule: int = 0) -> None:
        self.schedule = schedule

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        params: bytes,
        places: Sequence[int] = (),
    ) -> None:
        library = emulated("self_test_sm90")
        params = library.encoded(params, places)
        library.launch(f"self_test_{kernel}", grid, threads, shared, params, self.schedule)


EMULATED = Emulated()


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


NO_MAP = bytes(128)


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
_FIELDS += ("stride_a", "stride_b", "step_a", "step_b", "count", "mode", "dimensions")


def run(
    kernel: str,
    a: bytes,
    b: bytes,
    out: Tensor | None = None,
    *,
    at: Sequence[int] = (),
    threads: int = 32,
    shared: int = 1 << 17,
    machine: Machine = EMULATED,
    **fields: int,
) -> None:
    """Runs `self_test_<kernel>`; the fields are those of HopperTestParams, 0 by default."""
    fields.setdefault("dimensions", len(at))
    numbers = [*at, *[0] * (5 - len(at)), *(fields.pop(name, 0) for name in _FIELDS)]
    assert not fields, fields
    params = a + b + struct.pack("=Q18i", 0 if out is None else out.data_ptr(), *numbers)
    params += bytes(-len(params) % 64)
    machine.launch(kernel, (1, 1, 1), threads, shared, params, [0] if b == NO_MAP else [0, 128])


def pipeline(a: Tensor, b: Tensor, bug: int = 0, machine: Machine = EMULATED) -> Tensor:
    """y (2, 64, 64) = a (64, K) b (64, K)^T and its double, through TMA, wgmma and the ring of stages."""
    y = torch.full((2, 64, 64), torch.nan, dtype=a.dtype, device=machine.device)
    a, b = a.to(machine.device), b.to(machine.device)
    maps = tensor_map(a[None], (64, 64, 1)) + tensor_map(b[None], (64, 64, 1)) + tensor_map(y, (64, 16, 1))
    params = maps + struct.pack("=2i", a.shape[1] // 64, bug)
    params += bytes(-len(params) % 64)
    machine.launch("pipeline", (1, 1, 1), 384, 2 * 16384 + 4 * 2048, params, (0, 128, 256))
    return y.cpu()


GRID = (2, 8, 1)  # clusters of four along y
BLOCKS = 16


def exchanged(
    bug: int = 0,
    grid: tuple[int, int, int] = GRID,
    threads: int = 64,
    machine: Machine = EMULATED,
) -> tuple[Tensor, Tensor]:
    """(what each block of clusters has, what they make of it)."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-1000, 1000, (BLOCKS, 64), generator=generator, dtype=torch.int32).to(machine.device)
    out = torch.full((BLOCKS, 2, 64), -1, dtype=torch.int32, device=machine.device)
    machine.launch("cluster", grid, threads, 256, struct.pack("=QQi4x", values.data_ptr(), out.data_ptr(), bug))
    return values.cpu(), out.cpu()


def expected_exchange(values: Tensor) -> Tensor:
    clusters = values.view(2, 4, 2, 64)  # (cluster in y, rank, x, 64)
    sums = clusters.sum(1, dtype=torch.int32, keepdim=True).flip(3).expand_as(clusters)
    return torch.stack([sums, clusters.roll(1, 1)], 3).reshape(BLOCKS, 2, 64)


def passed_on(bug: int = 0, machine: Machine = EMULATED) -> Tensor:
    """What blocks of clusters make of what they sent each other through mbarriers, and what it should be."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-1000, 1000, (BLOCKS, 64), generator=generator, dtype=torch.int32)
    there, out = values.to(machine.device), torch.full((BLOCKS, 2, 64), -1, dtype=torch.int32, device=machine.device)
    machine.launch("cluster_ring", GRID, 64, 0, struct.pack("=QQi4x", there.data_ptr(), out.data_ptr(), bug))
    received = values.view(2, 4, 2, 64).roll(1, 1).flip(3).reshape(BLOCKS, 64)
    expected = torch.zeros_like(received)
    for number in range(4):
        expected = 3 * expected + 2 * (received + number) + 1
    return torch.stack([out[:, 0].cpu(), expected])
