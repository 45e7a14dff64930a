"""A GPU's driver that starts nothing, so that host time can be measured, and launches looked at, without a GPU.

Kernels are compiled for sm_90. Triton's own launcher runs, down to a library in the place of libcuda whose functions
return at once; launches of the `cuda` backend stop at the launcher. Tensors are in host memory.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

SHARED_BYTES, PROCESSORS = 232448, 132  # of an H200
# What Triton's launcher calls of the driver. cuPointerGetAttribute says where on the device a pointer points.
_LIBCUDA = """
#define RETURNS_AT_ONCE(name) int name() { return 0; }
%s
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuPointerGetAttribute(unsigned long *value, int what, unsigned long pointer) { *value = pointer; return 0; }
"""
_CALLS = (
    "cuDeviceGetAttribute cuFuncSetAttribute cuFuncGetAttribute cuGetErrorString cuDevicePrimaryCtxRetain cuDeviceGet "
    "cuCtxSetCurrent cuCtxSetLimit cuCtxGetLimit cuTensorMapEncodeTiled cuTensorMapEncodeIm2col cuModuleLoadData "
    "cuOccupancyMaxActiveClusters cuModuleGetFunction cuLaunchKernelEx cuFuncSetCacheConfig cuDriverGetVersion"
)


class StandInDriver:
    """What Triton calls of a GPU's driver, with the properties of an H200.

    Attributes:
        launched: grid and arguments of each launch, where launches are recorded.
    """

    def __init__(self, records: bool) -> None:
        self.launched: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        if records:
            self.utils, self.launcher_cls = self, self._recorder
        else:
            self.utils, self.launcher_cls = _triton_launcher(self)

    def _recorder(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher that notes its launches."""

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # rest: stream, function, packed metadata, launch metadata, two hooks, then the kernel's arguments
            self.launched.append(((x, y, z), rest[6:]))

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """What loading a kernel returns."""
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Shared memory (bytes) and multiprocessors of an H200."""
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": PROCESSORS}

    def get_current_device(self) -> int:
        """Device 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Stream 0."""
        return 0

    def get_current_target(self) -> Any:
        """The target sm_90."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@functools.cache
def _libcuda() -> Path:
    """Builds the library and loads it under the name by which Triton looks for the driver's."""
    folder = Path(tempfile.mkdtemp(prefix="stand_in_libcuda"))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(_LIBCUDA % "\n".join(f"RETURNS_AT_ONCE({name})" for name in _CALLS.split()))
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder


def _triton_launcher(driver: StandInDriver) -> tuple[Any, Any]:
    """Triton's own launcher, and the functions in C that it calls, above the library."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    knobs.nvidia.libcuda_path = str(_libcuda())
    utils = CudaUtils()
    utils.load_binary = driver.load_binary
    utils.get_device_properties = driver.get_device_properties
    return utils, CudaLauncher


class StandInLauncher:
    """A launcher of the `cuda` backend that starts nothing."""

    name = "stand-in"

    def device_facts(self, device: torch.device) -> tuple[int, int, int]:
        """Those of an H200."""
        return 90, PROCESSORS, SHARED_BYTES

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        """Does nothing."""


@contextmanager
def stand_in_gpu(records: bool = False) -> Iterator[StandInDriver]:
    """Within the block both GPU backends take tensors in host memory, with the tiles of an H200, and start nothing.

    Args:
        records: Whether launches of Triton kernels are recorded, in the place of Triton's own launcher.
    """
    from triton.runtime import driver

    from tdc_fast.kernels import conv_wgrad, tile_shapes
    from tdc_fast.ops import backends, builtin, checks, cuda_launch, triton

    stand_in, device = StandInDriver(records), tile_shapes.Device(90, PROCESSORS, SHARED_BYTES)
    active = driver._active  # the property driver.active needs a GPU
    _forget_kernels()
    driver.set_active(stand_in)
    try:
        with ExitStack() as patches:
            for owner, name, value in (
                (tile_shapes, "device_of", lambda _: device),
                (conv_wgrad, "device_of", lambda _: device),
                (triton, "_device_reason", lambda _: None),
                (triton, "check_conv_values", lambda *_: None),  # numbers of a GPU's tensors are not read
                (triton, "check_norm_values", lambda *_: None),
                (builtin.LazyTriton, "supports", lambda _, problem: triton.supports(problem)),
                (checks, "_check_tiles", lambda *_: None),  # in host memory a plan has none
            ):
                patches.enter_context(patch.object(owner, name, value))
            patches.enter_context(cuda_launch.use_launcher(StandInLauncher()))
            yield stand_in
    finally:
        driver._active = active
        _forget_kernels()
        backends.forget()


def _forget_kernels() -> None:
    """Forgets compiled kernels, which hold the launcher of the driver for which they were loaded."""
    from triton.runtime.jit import JITFunction

    from tdc_fast.kernels import launch

    launch._compiled.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("tdc_fast.kernels"):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def with_tiles(plan: Any) -> Any:
    """The plan, with the tile table that one on a GPU has."""
    from tdc_fast.kernels.tile_table import tile_table

    plan.tiles = tile_table(plan.offsets, plan.batch_size)
    return plan


def dense_memory(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers, images in channels_last memory, filters channel-innermost."""
    made = torch.randn(shape, dtype=dtype)
    if made.dim() == 5:
        return made.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made
