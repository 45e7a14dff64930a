"""CUDA kernels compiled at run time: the shipped sources through NVRTC, for a machine with a GPU but no nvcc.

A family of kernels is compiled at its first use (some seconds) and kept in a cache on disk, TDC_FAST_CACHE or
~/.cache/tdc_fast, under the hash of its sources and options, the architecture and the compiler's version. cupy has the
bindings of NVRTC and of the driver; compiling needs neither a GPU nor a driver.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tdc_fast.atomic import atomic_file
from tdc_fast.ops import native
from tdc_fast.ops.cuda_device import Facts, current_stream, device_facts, device_index
from tdc_fast.ops.cuda_families import read_sources

CACHE_VARIABLE = "TDC_FAST_CACHE"
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space")  # constexpr helpers that the host shares
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_directory() -> Path:
    """The folder of compiled kernels: TDC_FAST_CACHE, else ~/.cache/tdc_fast."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "tdc_fast"


def target(arch: int) -> str:
    """NVRTC's name of an architecture; for compute capability 9.0, with the instructions specific to it."""
    return "sm_90a" if arch == 90 else f"sm_{arch}"


def unavailable(arch: int) -> str | None:
    """None when kernels can be compiled for compute capability `arch` here, else why not."""
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        return f"NVRTC needs cupy: pip install 'tdc_fast[gpu]' ({error})"
    try:
        known = nvrtc.getSupportedArchs()
        version = nvrtc.getVersion()
    except Exception as error:  # cupy has its own exceptions for a missing library
        return f"NVRTC cannot be loaded: pip install nvidia-cuda-nvrtc ({error})"
    if arch not in known:
        return f"NVRTC {version[0]}.{version[1]} knows sm_{known[0]} to sm_{known[-1]}, not sm_{arch}"
    return None


def compile_family(family: str, arch_name: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Compiles a family for an architecture such as "sm_90a"; returns the cubin and the compiler's log.

    Raises:
        RuntimeError: With the kernels of the family and the compiler's log.
    """
    from cupy_backends.cuda.libs import nvrtc

    sources = read_sources(family)
    unit = next(iter(sources))
    headers = {name.encode(): text.encode() for name, text in sources.items() if name != unit}
    program = nvrtc.createProgram(sources[unit], unit, list(headers.values()), list(headers))
    try:
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={arch_name}", *_OPTIONS, *options))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            kernels = ", ".join(native.module.cuda_kernels.get(family, [family]))
            raise RuntimeError(f"NVRTC could not compile {kernels} for {arch_name} ({error}):\n{log}") from error
        return _whole(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """A cubin with its last byte, a zero, which cupy takes for the end of a string: nvdisasm refuses it without."""
    segments, sections = struct.unpack_from("<QQ", cubin, 0x20)  # of an ELF header: where the two tables begin
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", cubin, 0x36)
    end = max(segments + segment_size * segment_count, sections + section_size * section_count)
    return cubin.ljust(end, b"\0") if len(cubin) == end - 1 else cubin


def cache_path(family: str, arch_name: str) -> Path:
    """The path of a family's cubin in the cache. Its name is a hash of everything that determines the content."""
    from cupy_backends.cuda.libs import nvrtc

    digest = hashlib.sha256(repr((nvrtc.getVersion(), arch_name, _OPTIONS)).encode())
    for name, text in read_sources(family).items():
        digest.update(f"\0{name}\0{len(text)}\0{text}".encode())
    return cache_directory() / f"{family}-{arch_name}-{digest.hexdigest()[:32]}.cubin"


def cubin_of(family: str, arch_name: str) -> bytes:
    """The cubin from the cache, or compiled and added to it. A damaged entry is compiled again."""
    path = cache_path(family, arch_name)
    found = _read_entry(path)
    if found is not None:
        return found
    cubin, _ = compile_family(family, arch_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {path.parent}, so every process compiles them again; set "
            f"{CACHE_VARIABLE} to a writable folder ({error})",
            stacklevel=2,
        )
    return cubin


def _read_entry(path: Path) -> bytes | None:
    """The cubin of a cache entry (its sha256, then the cubin); None where it is missing or damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, cubin = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


@functools.cache
def _family_of() -> dict[str, str]:
    return {kernel: family for family, kernels in native.module.cuda_kernels.items() for kernel in kernels}


class Nvrtc:
    """Runs kernels that NVRTC compiled, through the driver; modules stay loaded on each device."""

    name = "nvrtc"

    def __init__(self) -> None:
        self._functions: dict[tuple[int, str], Any] = {}
        self._shared: dict[Any, int] = {}
        self._modules: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()

    def device_facts(self, device: torch.device) -> Facts:
        """The facts of a device, which planners choose tiles by."""
        return device_facts(device)

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        """Starts the launches in order on torch's current stream."""
        from cupy_backends.cuda.api import driver

        index = device_index(device)
        with torch.cuda.device(index):  # the driver's calls go to the current context: that of torch on this device
            if not driver.ctxGetCurrent():  # a thread new to CUDA, such as autograd's: torch's first call makes it so
                torch.cuda.mem_get_info(index)
            stream = current_stream(index)
            for launch in launches:
                function = self._function(index, device, launch, driver)
                encoded = launch.encoded_params() if launch.tensor_maps else launch.params
                params = ctypes.create_string_buffer(encoded, len(encoded))
                arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))  # one struct, copied by the call
                _checked(
                    launch, "cuLaunchKernel", driver.launchKernel, function, *launch.grid, launch.threads, 1, 1,
                    launch.shared_bytes, stream, ctypes.addressof(arguments), 0,
                )  # fmt: skip

    def _function(self, index: int, device: torch.device, launch: Any, driver: Any) -> Any:
        function = self._functions.get((index, launch.kernel))
        if function is None:
            with self._lock:
                module = self._module(index, device, launch, driver)
                function = _checked(launch, "cuModuleGetFunction", driver.moduleGetFunction, module, launch.kernel)
                self._functions[index, launch.kernel] = function
        # By default a block gets 48 KB, minus what the kernel declares statically.
        if launch.shared_bytes > self._shared.get(function, 0):
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(launch, "cuFuncSetAttribute", driver.funcSetAttribute, function, attribute, launch.shared_bytes)
            self._shared[function] = launch.shared_bytes
        return function

    def _module(self, index: int, device: torch.device, launch: Any, driver: Any) -> Any:
        family = _family_of().get(launch.kernel)
        if family is None:
            raise RuntimeError(f"no kernel of that name in the sources: {describe(launch)}")
        module = self._modules.get((index, family))
        if module is None:
            cubin = cubin_of(family, target(device_facts(device)[0]))
            module = _checked(launch, "cuModuleLoadData", driver.moduleLoadData, cubin)
            self._modules[index, family] = module
        return module


def describe(launch: Any) -> str:
    """Describes a launch for error messages."""
    return (
        f"kernel {launch.kernel}, grid {tuple(launch.grid)}, {launch.threads} threads, {launch.shared_bytes} bytes of "
        f"dynamic shared memory, for {launch.shapes}"
    )


def _checked(launch: Any, call: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # the driver's error in cupy's own class
        raise RuntimeError(
            f"{call} failed: {error}; {describe(launch)}; or an earlier kernel failed and the error appears only now: "
            "set CUDA_LAUNCH_BLOCKING=1 to find out"
        ) from error
