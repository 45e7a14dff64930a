"""What runs the launches that the native planners return, and which of them serves a device.

A launcher is an object with a `name`, `device_facts(device) -> (arch, multiprocessors, shared_limit)`, which planners
are told, and `run(launches, device)`. `Native` runs the kernels that nvcc built into tdc_fast._native; `Nvrtc` (in
tdc_fast.ops.cuda_nvrtc) compiles the same sources on the machine that has the GPU. Tests bring an emulator.

Nothing here touches a GPU before a problem on one comes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from tdc_fast.ops import cpu

Facts = tuple[int, int, int]


class Launcher(Protocol):
    """Runs kernels. `run` raises RuntimeError naming the kernel and the shapes."""

    name: str

    def device_facts(self, device: torch.device) -> Facts: ...

    def run(self, launches: Sequence[Any], device: torch.device) -> None: ...


def device_index(device: torch.device) -> int:
    """The number of a CUDA device; "cuda" alone is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


_facts: dict[int, Facts] = {}


def device_facts(device: torch.device) -> Facts:
    """(compute capability * 10, number of SMs, bytes of shared memory a block may opt in to) of a CUDA device."""
    index = device_index(device)
    if index not in _facts:
        found = torch.cuda.get_device_properties(index)
        arch = found.major * 10 + found.minor
        _facts[index] = (arch, found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return _facts[index]


class Native:
    """The kernels that nvcc compiled into tdc_fast._native."""

    name = "native"

    def device_facts(self, device: torch.device) -> Facts:
        return device_facts(device)

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        index = device_index(device)
        with torch.cuda.device(index):
            cpu.native.cuda_launch(list(launches), index, torch.cuda.current_stream(index).cuda_stream)


def build_covers(architectures: str, arch: int) -> bool:
    """Whether a build runs on compute capability `arch` (86 for 8.6).

    architectures: CMake's list, such as "80-real 90a-real 100-virtual". Machine code runs on the same major version
    from its minor one on, that of an "a" architecture on itself only; PTX ("-virtual") on everything from there on.
    """
    for text in architectures.split():
        parts = re.fullmatch(r"(\d+)([af]?)(?:-(real|virtual))?", text)
        if parts is None:
            continue
        built, suffix, kind = int(parts[1]), parts[2], parts[3]
        if suffix:
            if built == arch:
                return True
            continue
        if kind != "virtual" and built // 10 == arch // 10 and built <= arch:
            return True
        if kind != "real" and built <= arch:
            return True
    return False


def choose(arch: int) -> tuple[Launcher | None, str]:
    """The launcher for a GPU of compute capability `arch`, or None and why there is none."""
    built = cpu.native.cuda_architectures
    if not built:
        missing = "was built without nvcc"
    elif not build_covers(built, arch):
        missing = f"was built for {built}"
    elif cpu.native.cuda_device_count() == 0:  # though torch has one
        missing = f"was built with CUDA {cpu.native.cuda_runtime_version() // 1000}, which the driver does not serve"
    else:
        return Native(), ""
    from tdc_fast.ops import cuda_nvrtc

    reason = cuda_nvrtc.unavailable(arch)
    if reason is None:
        return cuda_nvrtc.Nvrtc(), ""
    return None, f"the native module {missing}, the device is sm_{arch}, and {reason}"
