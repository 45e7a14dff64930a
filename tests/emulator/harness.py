"""Builds kernels for the CPU emulator and launches them.

A family is a row of `csrc/cuda/families.def` (or one of SELF_TESTS, of the emulator itself). Each builds into a shared
library, once per run of the tests, in a temporary folder; variants are sanitized builds and builds with a planted bug
(`-DTDC_PLANT_<NAME>`, see TDC_PLANTED in csrc/cuda/device.cuh). Builds without sanitizers check shared memory for
races.

    launcher = EmulatorLauncher(emulated("plan"))
    with tdc_fast.ops.cuda_launch.use_launcher(launcher): ...
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# Kernels of the emulator's own: of every wrapper of device.cuh and of device_sm90.cuh, and of the schedules of tiles.
SELF_TESTS = ("self_test", "self_test_sm90", "hopper_schedules")
RUNTIME = ("fiber", "runtime")
# What builds a family so that any planted bug can be chosen at run time, see EmulatedLibrary.planted.
AT_RUNTIME = "PLANTS_AT_RUNTIME"
COMPILER = shutil.which("g++")
# Schedules worth running a kernel under: first thread first, last thread first, two random ones.
SCHEDULES = (0, 1, 2, 3)
# The facts of the emulated device: compute capability * 10, number of SMs, bytes of shared memory of a block.
FACTS = (80, 4, 166912)

# Set for the sanitized run of a test file, see run_sanitized.
SANITIZED = os.environ.get("TDC_EMULATOR_SANITIZE") == "1"
plain_only = pytest.mark.skipif(SANITIZED, reason="says nothing more under sanitizers")

_FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DTDC_EMULATOR", f"-I{CSRC}"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Werror=return-type"),
    # Libraries in one process share nothing; an unwritten register holds a pattern (-1.7e38).
    *("-fno-gnu-unique", "-ftrivial-auto-var-init=pattern"),
]
# -O0 compiles in less than half the time of -O1, which the small problems of the tests do not win back. The checks left
# out take a third of what remains, and the address sanitizer reports what is read or written through such a pointer.
_SANITIZE = [
    *("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "-fno-sanitize=null,object-size,pointer-overflow",
]
# The calls this compiles in at every access are answered by csrc/emulator/hooks.cpp, not by the sanitizer's library.
_RACE_CHECK = ["-fsanitize=thread"]


class EmulatorError(RuntimeError):
    """A kernel that failed in the emulator: deadlock, divergence, misalignment, trap, or a wrong launch."""


class EmulatedLibrary:
    """The kernels of one family."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._library = ctypes.CDLL(str(path))
        self._library.tdc_emulated_kernels.restype = ctypes.c_char_p
        self._library.tdc_multiply_adds.restype = ctypes.c_ulonglong
        self._library.tdc_busiest_block.restype = ctypes.c_ulonglong
        self.kernels = tuple(self._library.tdc_emulated_kernels().decode().split())

    def launch(
        self, kernel: str, grid: Sequence[int], threads: int, shared_bytes: int, params: bytes, schedule: int
    ) -> None:
        """Runs a grid to its end; raises EmulatorError with the emulator's message."""
        message = ctypes.create_string_buffer(1 << 14)
        failed = self._library.tdc_emulate(
            kernel.encode(),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_uint(shared_bytes),
            params,
            ctypes.c_uint(len(params)),
            ctypes.c_uint(schedule),
            message,
            len(message),
        )
        if failed:
            raise EmulatorError(self._with_lines(message.value.decode(errors="replace")))

    def encoded(self, params: bytes, places: Iterable[int]) -> bytes:
        """Parameters with the tensor maps at these places encoded, as the driver does; an EmulatorError where it would
        refuse one."""
        memory, message = ctypes.create_string_buffer(params, len(params)), ctypes.create_string_buffer(1 << 10)
        for place in places:
            if place % 64 or place + 128 > len(params):
                raise EmulatorError(f"no tensor map can be at byte {place} of {len(params)}")
            if self._library.tdc_encode(ctypes.byref(memory, place), message, len(message)):
                raise EmulatorError(f"{message.value.decode()}, at byte {place} of the parameters")
        return memory.raw

    def multiply_adds(self) -> int:
        """Multiply-adds of the matrix instructions run so far."""
        return int(self._library.tdc_multiply_adds())

    def busiest_block(self) -> int:
        """The most multiply-adds of matrix instructions that one block of the last launch has run."""
        return int(self._library.tdc_busiest_block())

    @contextlib.contextmanager
    def without_race_check(self) -> Iterator[None]:
        """Races are not reported but take effect, as on a GPU and always in sanitized libraries."""
        self._library.tdc_check_races(0)
        try:
            yield
        finally:
            self._library.tdc_check_races(int(not SANITIZED))

    @contextlib.contextmanager
    def planted(self, bug: str) -> Iterator[None]:
        """Within the block a bug is planted in this library, which was built with AT_RUNTIME."""
        self._library.tdc_plant(bug.encode())
        try:
            yield
        finally:
            self._library.tdc_plant(b"")

    def _with_lines(self, message: str) -> str:
        """Puts "at file:line" for the code addresses "[+0x...]" of a message, callers last, if addr2line is there."""

        def line_of(match: re.Match[str]) -> str:
            command = ["addr2line", "--inlines", "--basenames", f"--exe={self._path}", match[1]]
            places = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
            outside = [
                place.split()[0] for place in places if not place.startswith(("device.h:", "device_sm90.h:", "??"))
            ]
            return f"at {' in '.join(outside)}" if outside else match[0]

        return re.sub(r"\[\+(0x[0-9a-f]+)\]", line_of, message) if shutil.which("addr2line") else message


class EmulatorLauncher:
    """A launcher for tdc_fast.ops.cuda_launch.use_launcher: runs launches, in order, in the emulator.

    schedule: which thread goes first, see SCHEDULES; may be changed between runs. `launched` lists the kernels run.
    """

    name = "emulator"

    def __init__(self, *libraries: EmulatedLibrary, schedule: int = 0, facts: tuple[int, int, int] = FACTS) -> None:
        self._library_of = {kernel: library for library in libraries for kernel in library.kernels}
        self.schedule = schedule
        self.facts = facts
        self.launched: list[str] = []

    def multiply_adds(self) -> int:
        """Multiply-adds of the matrix instructions run so far."""
        return sum(library.multiply_adds() for library in set(self._library_of.values()))

    def busiest_block(self) -> int:
        """The most multiply-adds that one block of the last launch has run."""
        return self._library_of[self.launched[-1]].busiest_block()

    @contextlib.contextmanager
    def planted(self, bug: str) -> Iterator[None]:
        """Within the block a bug is planted in every library, which were built with AT_RUNTIME."""
        with contextlib.ExitStack() as stack:
            for library in set(self._library_of.values()):
                stack.enter_context(library.planted(bug))
            yield

    def device_facts(self, device: torch.device) -> tuple[int, int, int]:
        return self.facts

    def run(self, launches: Iterable[Any], device: torch.device | None = None) -> None:
        for launch in launches:
            library = self._library_of.get(launch.kernel)
            if library is None:
                known = ", ".join(sorted(self._library_of))
                raise EmulatorError(f"no emulated kernel {launch.kernel!r} ({launch.shapes}); there are: {known}")
            shared = launch.shared_bytes
            try:
                params = library.encoded(bytes(launch.params), launch.tensor_maps)
                library.launch(launch.kernel, launch.grid, launch.threads, shared, params, self.schedule)
            except EmulatorError as error:
                raise EmulatorError(f"{error}\nshapes: {launch.shapes}") from None
            self.launched.append(launch.kernel)

    def __call__(self, launches: Iterable[Any], stream: Any = None) -> None:
        self.run(launches)


def emulated(family: str, *plants: str, sanitize: bool = SANITIZED) -> EmulatedLibrary:
    """The library of a family, built on first use; `plants` are names of planted bugs. Skips without a compiler."""
    return _load(build(family, plants, sanitize))


def compiler() -> str:
    """g++, or a skip with the reason."""
    if COMPILER is None:
        pytest.skip("no g++ on PATH to build the emulator with")
    if sys.platform != "linux":
        pytest.skip(f"the emulator switches stacks as Linux on x86-64 or arm64 does, not {sys.platform}")
    return COMPILER


def _unit(family: str, sanitize: bool) -> Path:
    """The translation unit of a family; one that follows from families.def is written to the build folder.

    Under sanitizers without the kernels for fp16: their addresses are those of the kernels for bf16.
    """
    if family in SELF_TESTS:
        return CSRC / "emulator" / f"{family}_kernels.cuh"
    from tdc_fast.ops import native  # with torch, whose import takes seconds under ASan
    from tests.chosen_kernels import unit_of

    kernels = [name for name in native.module.cuda_kernels[family] if not (sanitize and "_fp16" in name)]
    unit = build_folder() / f"{family}{'-sanitized' if sanitize else ''}.cu"
    partial = unit.with_name(f"{unit.name}.{os.getpid()}")
    partial.write_text(unit_of(family, kernels))
    return partial.replace(unit)


def build(family: str, plants: tuple[str, ...] = (), sanitize: bool = False) -> Path:
    """Path of the shared library of a family. Fails with the compiler's text."""
    compiler()
    kind = "sanitized" if sanitize else "plain"
    library = build_folder() / f"{'-'.join([family, kind, *plants])}.so"
    if library.exists():
        return library
    # Only kernels get the undefined-behaviour sanitizer: it triples the emulator's own compile time.
    own = ["-O1", "-fsanitize=address"] if sanitize else ["-O2"]
    jobs = {build_folder() / f"{name}-{kind}.o": [*own, str(CSRC / "emulator" / f"{name}.cpp")] for name in RUNTIME}
    target = library.with_suffix(".o")
    checks = _SANITIZE if sanitize else _RACE_CHECK
    planted = [f"-DTDC_{plant}" if plant == AT_RUNTIME else f"-DTDC_PLANT_{plant}=1" for plant in plants]
    # Hopper's kernels leave the work to the emulator, so that -O0, which compiles eight times as fast, costs nothing.
    level = ["-O0"] if "hopper" in family else []
    jobs[target] = ["-g1", *checks, *level, *planted, "-x", "c++", str(_unit(family, sanitize))]
    missing = [(["-c", *arguments], made) for made, arguments in jobs.items() if not made.exists()]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: compile_to(*job), missing))
    runtime = [str(build_folder() / f"{name}-{kind}.o") for name in RUNTIME]
    compile_to(["-shared", *(_SANITIZE if sanitize else []), str(target), *runtime, "-ldl"], library)
    return library


def run_sanitized(*test_files: Path) -> str:
    """Runs test files again, in one process of their own, with every library built under ASan and UBSan.

    Fails with the end of that process's output, which contains the sanitizer's report; else returns the output.
    """
    environment = sanitized_environment(sanitizer_runtime())
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *map(str, test_files)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    said = result.stdout + result.stderr
    assert result.returncode == 0, f"Under sanitizers:\n{said[-6000:]}"
    return said


def sanitizer_runtime() -> str:
    """What to preload: the address sanitizer's library, which must come first, and the C++ library, so that it
    can intercept exceptions. Skips where g++ has none."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"g++ has no shared {name}")
        paths.append(path)
    return " ".join(paths)


def sanitized_environment(runtime: str) -> dict[str, str]:
    """Environment of a process that loads sanitized libraries; builds are shared with this one."""
    return {
        **os.environ,
        "LD_PRELOAD": runtime,
        "TDC_EMULATOR_SANITIZE": "1",
        "TDC_EMULATOR_BUILD": str(build_folder()),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@functools.cache
def build_folder() -> Path:
    """Where this run's builds are; a sanitized run shares the folder of the run that started it."""
    given = os.environ.get("TDC_EMULATOR_BUILD")
    if given:
        return Path(given)
    _folder_owner.append(tempfile.TemporaryDirectory(prefix="tdc_emulator_"))
    return Path(_folder_owner[0].name)


_folder_owner: list[tempfile.TemporaryDirectory[str]] = []  # removed at exit


@functools.cache
def _load(path: Path) -> EmulatedLibrary:
    return EmulatedLibrary(path)


def compile_to(arguments: list[str], target: Path) -> None:
    """Runs g++; the target appears whole or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [compiler(), *_FLAGS, *arguments, "-o", str(partial)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-6000:]}"
    partial.replace(target)
