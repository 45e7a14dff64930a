"""Chooses the launcher of a device and launches through it.

`Native` runs the kernels that nvcc built into tdc_fast._native; `Nvrtc` compiles the same sources on the machine that
has the GPU; tests inject an emulator. No GPU is initialised before the first call with tensors on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tdc_fast.kernels import recording
from tdc_fast.ops import backends, cuda_native, cuda_nvrtc, native
from tdc_fast.ops.cuda_device import Facts, Launcher, device_facts, device_index
from tdc_fast.ops.cuda_planned import Planned

_OLDEST_ARCHITECTURE = 80
_injected: Launcher | None = None
_launchers: dict[int, tuple[Launcher | None, str]] = {}


@contextmanager
def use_launcher(launcher: Launcher) -> Iterator[None]:
    """Within the block this launcher runs every kernel, also for tensors in host memory: tests run the emulator so."""
    global _injected
    before, _injected = _injected, launcher
    backends.forget()
    try:
        yield
    finally:
        _injected = before
        backends.forget()


def serves(device: torch.device) -> bool:
    """Whether kernels can run on devices of this type: on CUDA devices, and on any while a launcher is injected."""
    return device.type == "cuda" or _injected is not None


def launcher_for(device: torch.device) -> tuple[Launcher | None, str]:
    """What runs kernels on a device, or None and why nothing does."""
    if _injected is not None:
        return _injected, ""
    if device.type == "cuda" and device.index in _launchers:  # the fast path of every launch
        return _launchers[device.index]
    if native.module is None:
        return None, native.why_missing
    if device.type != "cuda":
        return None, f"its tensors live on a CUDA device, not on {device}"
    if not torch.cuda.is_available():
        return None, "there is no GPU that torch can use here"
    index = device_index(device)
    if index not in _launchers:
        _launchers[index] = choose(device_facts(device)[0])
    return _launchers[index]


def choose(arch: int) -> tuple[Launcher | None, str]:
    """The launcher for a GPU of compute capability `arch` (86 for 8.6), or None and why there is none."""
    if arch < _OLDEST_ARCHITECTURE:
        return None, f"it needs sm_{_OLDEST_ARCHITECTURE} or newer, not sm_{arch}"
    missing = cuda_native.unavailable(arch)
    if missing is None:
        return cuda_native.Native(), ""
    reason = cuda_nvrtc.unavailable(arch)
    if reason is None:
        return cuda_nvrtc.Nvrtc(), ""
    return None, f"the native module {missing}, the device is sm_{arch}, and {reason}"


def _require(device: torch.device) -> Launcher:
    launcher, reason = launcher_for(device)
    if launcher is None:
        raise RuntimeError(f"no kernel can be launched on {device}: {reason}")
    return launcher


def launch_planned(planner: Callable[..., Any], device: torch.device, arguments: dict[str, Any]) -> None:
    """Runs what a planner plans on torch's current stream of a device.

    The addresses among the arguments must stay valid until torch would reuse the memory, as for torch's own kernels.

    Args:
        planner: Of the native module; its launches depend on the arguments alone.
        device: A device that something can launch on.
        arguments: All the planner's arguments but `device`.

    Raises:
        RuntimeError: A launch failed (the message names it), or nothing can launch on the device.
    """
    launcher = _require(device)
    facts = launcher.device_facts(device)
    launches = planner(**arguments, device=facts)
    launcher.run(launches, device)
    recording.note(Planned(lambda replaced: planner(**arguments | replaced, device=facts), arguments, launcher, device))


def launcher_facts(device: torch.device) -> Facts:
    """The facts of a device as its launcher has them, which planners choose tiles by.

    Raises:
        RuntimeError: Nothing can launch on the device.
    """
    return _require(device).device_facts(device)
