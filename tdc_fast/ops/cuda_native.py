"""The launcher of the kernels that nvcc compiled into tdc_fast._native."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from tdc_fast.ops import native
from tdc_fast.ops.cuda_device import Facts, current_device_is, current_stream, device_facts, device_index


class Native:
    """Runs kernels through the CUDA runtime of the native module."""

    name = "native"

    def device_facts(self, device: torch.device) -> Facts:
        """The facts of a device, which planners choose tiles by."""
        return device_facts(device)

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        """Starts the launches in order on torch's current stream."""
        index = device_index(device)
        stream = current_stream(index)
        if current_device_is(index):
            native.module.cuda_launch(launches, index, stream)
        else:
            with torch.cuda.device(index):  # cuda_launch leaves this device the current one
                native.module.cuda_launch(launches, index, stream)


def unavailable(arch: int) -> str | None:
    """None when the build has kernels for compute capability `arch` (86 for 8.6), else why not."""
    built = native.module.cuda_architectures
    if not built:
        return "was built without nvcc"
    if not build_covers(built, arch):
        return f"was built for {built}"
    if native.module.cuda_device_count() == 0:  # though torch has one
        return f"was built with CUDA {native.module.cuda_runtime_version() // 1000}, which the driver does not serve"
    return None


def build_covers(architectures: str, arch: int) -> bool:
    """Whether a build runs on compute capability `arch` (86 for 8.6).

    Machine code runs on devices of the same major version and the same or a later minor version; that of an "a"
    architecture runs on this architecture only. PTX ("-virtual") runs on the same and all later versions.

    Args:
        architectures: CMake's list, such as "80-real 90a-real 100-virtual".
        arch: Compute capability * 10 of the device.
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
