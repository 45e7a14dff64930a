"""CUDA devices as planners and launchers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

Facts = tuple[int, int, int]  # compute capability * 10, number of SMs, bytes of shared memory a block may opt in to


class Launcher(Protocol):
    """Runs kernels on a device: what `cuda_launch.use_launcher` takes."""

    name: str

    def device_facts(self, device: torch.device) -> Facts:
        """The facts of a device, which planners choose tiles by."""

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        """Starts the launches in order on torch's current stream.

        Raises:
            RuntimeError: Naming the kernel and the shapes.
        """


def device_index(device: torch.device) -> int:
    """The number of a CUDA device; "cuda" alone is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def current_device_is(index: int) -> bool:
    """Whether the CUDA device of that number is torch's current one; cheaper than entering torch.cuda.device."""
    return torch._C._cuda_getDevice() == index


def current_stream(index: int) -> int:
    """The address of torch's current stream of a CUDA device, without a Python object for it."""
    return torch._C._cuda_getCurrentRawStream(index)


_facts: dict[int, Facts] = {}


def device_facts(device: torch.device) -> Facts:
    """The facts of a CUDA device, as torch reports them."""
    index = device_index(device)
    if index not in _facts:
        found = torch.cuda.get_device_properties(index)
        arch = found.major * 10 + found.minor
        _facts[index] = (arch, found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return _facts[index]
