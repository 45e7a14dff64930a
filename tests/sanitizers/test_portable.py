"""The portable kernels use no x86 instruction: they compile for arm64, and under another compiler."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(p for folder in ("common", "cpu") for p in (CSRC / folder).glob("*.cpp") if "bind_" not in p.name)
FLAGS = ["-std=c++17", "-O1", "-Wno-psabi", f"-I{CSRC}", "-DTDC_FAST_ISA=portable", "-DTDC_FAST_ISA_portable"]


def compile_all(compiler: str, *extra: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on PATH")
    for source in SOURCES:
        command = [compiler, *FLAGS, *extra, str(source)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, f"{source.name}: {result.stderr[-3000:]}"


def test_compiles_for_arm64() -> None:
    compile_all("aarch64-linux-gnu-g++", "-S", "-o", "/dev/null")


def test_compiles_with_clang() -> None:
    compile_all("clang++", "-fsyntax-only")


def test_no_source_includes_x86_intrinsics_unguarded() -> None:
    headers = re.compile(r"#include\s*<(\w*mmintrin|x86intrin|immintrin|arm_neon)\.h>")
    for path in [*SOURCES, *CSRC.glob("c*/*.h")]:
        for match in headers.finditer(path.read_text()):
            guard = path.read_text()[: match.start()].rfind("#if")
            assert guard >= 0 and "TDC_FAST" in path.read_text()[guard : match.start()], f"{path.name}: {match.group()}"
