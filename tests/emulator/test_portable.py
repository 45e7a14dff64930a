"""Every compiler accepts the wrappers of csrc/cuda/device.cuh, and the emulator also works without its assembly."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulator.harness import (
    AT_RUNTIME,
    CSRC,
    RUNTIME,
    SELF_TESTS,
    EmulatedLibrary,
    build,
    build_folder,
    compile_to,
)
from tests.emulator.harness import plain_only as pytestmark  # noqa: F401  the name is what pytest looks for

ARCHITECTURES = ("80", "90a")
SOURCES = {name: CSRC / "emulator" / f"{name}_kernels.cuh" for name in SELF_TESTS}
every_wrapper = pytest.mark.parametrize(
    "source, arch", [(SOURCES["self_test"], arch) for arch in ARCHITECTURES] + [(SOURCES["self_test_sm90"], "90a")]
)


def test_switching_stacks_through_ucontext_runs_the_same_kernels() -> None:
    """This is how stacks are switched on processors other than x86-64 and arm64."""
    folder, library = build_folder(), build("self_test", (AT_RUNTIME,))
    fiber, ours = folder / "fiber-ucontext.o", folder / "self_test-ucontext.so"
    compile_to(["-c", "-O2", "-DTDC_EMULATOR_UCONTEXT", str(CSRC / "emulator/fiber.cpp")], fiber)
    others = [str(folder / f"{name}-plain.o") for name in RUNTIME if name != "fiber"]
    compile_to(["-shared", str(library.with_suffix(".o")), str(fiber), *others, "-ldl"], ours)
    values, out = (ctypes.c_float * 128)(*range(128)), (ctypes.c_float * 128)()
    addresses = ctypes.addressof(values), 0, ctypes.addressof(out)
    params = b"".join(a.to_bytes(8, "little") for a in addresses) + bytes(8)
    EmulatedLibrary(ours).launch("self_test_reverse", (1, 1, 1), 128, 0, params, 0)
    assert list(out) == list(range(127, -1, -1))


@pytest.mark.parametrize("name", ["aarch64-linux-gnu-g++", "clang++"])
def test_the_emulator_compiles_elsewhere(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} on PATH")
    assembly = ["-c", str(CSRC / "emulator/fiber.cpp"), "-o", os.devnull]
    kernels = [["-fsyntax-only", "-x", "c++", "-include", str(source), os.devnull] for source in SOURCES.values()]
    for arguments in (assembly, *kernels):
        command = [name, "-std=c++17", "-O1", "-DTDC_EMULATOR", f"-I{CSRC}", "-Wall", "-Werror", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]


@every_wrapper
def test_every_wrapper_compiles_with_nvcc(source: Path, arch: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    unit = tmp_path / "self_test.cu"
    unit.write_text(f'#include "{source}"\n')
    options = ["-std=c++17", target, f"-I{CSRC}", "-Werror=all-warnings", "-cubin", "-o", str(tmp_path / "cubin")]
    result = subprocess.run(["nvcc", *options, str(unit)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@every_wrapper
def test_every_wrapper_compiles_with_nvrtc(source: Path, arch: str) -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="no cupy: pip install tdc_fast[gpu]")
    names = ["cuda/device.cuh", "cuda/device_sm90.cuh", "cuda/tensor_map.h"]
    headers = [(CSRC / name).read_bytes() for name in names]
    program = nvrtc.createProgram(source.read_text(), "self_test.cu", headers, [name.encode() for name in names])
    try:
        nvrtc.compileProgram(program, [f"--gpu-architecture=sm_{arch}", "-std=c++17"])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert nvrtc.getCUBIN(program)
