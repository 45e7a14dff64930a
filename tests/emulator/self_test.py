"""Launches of the emulator's own test kernels (csrc/emulator/self_test_kernels.cuh)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from tests.emulator.harness import AT_RUNTIME, emulated

if TYPE_CHECKING:
    from torch import Tensor


def launch(
    kernel: str,
    *addresses: int,
    count: int = 0,
    mode: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    threads: int = 32,
    shared: int = 0,
    schedule: int = 0,
    plant: str = "",
) -> None:
    """Runs `self_test_<kernel>`. addresses: in, other, out. The rest are fields of SelfTestParams and of the launch."""
    library = emulated("self_test", AT_RUNTIME)
    params = struct.pack("=QQQii", *addresses, count, mode)
    with library.planted(plant):
        library.launch(f"self_test_{kernel}", grid, threads, shared, params, schedule)


def run(kernel: str, out: Tensor, source: Tensor | None = None, other: Tensor | None = None, **settings: Any) -> Tensor:
    """The same on tensors. Returns `out`."""
    launch(kernel, *(0 if tensor is None else tensor.data_ptr() for tensor in (source, other, out)), **settings)
    return out
