"""All of the native CPU code under sanitizers, on every instruction set of this processor, without torch.

CMake builds the C++ test programs and everything they link with `-fsanitize=address,undefined`; CTest runs each program
once per instruction set. The thread pool runs under the thread sanitizer as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
PLANTED = {"read-past-the-end": "AddressSanitizer", "overflow": "runtime error: signed integer overflow"}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++, c++ or $CXX)")


def run(command: list[str | Path], **changes: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, **changes)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def built_with(flags: list[str], sources: list[str], program: Path) -> None:
    """Compiles a program straight from its sources, or skips where the compiler has no such sanitizer."""
    assert COMPILER is not None
    paths = [str(ROOT / "csrc" / source) for source in sources]
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-g",
        *flags,
        f"-I{ROOT / 'csrc'}",
        *paths,
        "-o",
        program,
        "-pthread",
        "-ldl",
    ]
    result = run(command)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip(f"{COMPILER} lacks the library for {' '.join(flags)}")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the test programs under the address and undefined-behaviour sanitizers."""
    if shutil.which("cmake") is None or shutil.which("ctest") is None:
        pytest.skip("no cmake on PATH: pip install cmake")
    probe = tmp_path_factory.mktemp("probe")
    built_with(
        ["-fsanitize=address,undefined"], ["tests/plan_test.cpp", "cpu/plan.cpp", "common/cpu_isa.cpp"], probe / "p"
    )
    build = tmp_path_factory.mktemp("sanitized")
    options = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_COMPILER": str(COMPILER),
        "TDC_FAST_BUILD": "cpu",
        "TDC_FAST_BUILD_PYTHON": "OFF",
        "TDC_FAST_BUILD_TESTS": "ON",
        "TDC_FAST_SANITIZE": "address,undefined",
    }
    generator = ["-GNinja"] if shutil.which("ninja") else []
    configured = run(["cmake", *generator, f"-S{ROOT}", f"-B{build}", *(f"-D{k}={v}" for k, v in options.items())])
    assert configured.returncode == 0, configured.stdout + configured.stderr
    made = run(["cmake", "--build", build, "--parallel", str(min(2, os.cpu_count() or 1))])
    assert made.returncode == 0, made.stdout[-5000:]
    return build


def test_every_program_passes_on_every_instruction_set(sanitized: Path) -> None:
    result = run(["ctest", "--test-dir", sanitized, "--output-on-failure"], OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout[-5000:]
    passed = set(re.findall(r"(\w+_test\.\w+) \.+\s+Passed", result.stdout))
    programs = {path.stem for path in (ROOT / "csrc" / "tests").glob("*_test.cpp")}
    assert {"plan_test", "group_norm_test", "parallel_test"} <= programs
    assert {f"{program}.portable" for program in programs} <= passed


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(sanitized: Path, bug: str, isa: str) -> None:
    result = run([sanitized / "group_norm_test", f"--plant={bug}"], TDC_FAST_CPU_ISA=isa)
    if result.returncode == 77:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode not in (0, 77)
    assert PLANTED[bug] in result.stderr


def test_the_thread_pool_has_no_data_race(tmp_path: Path) -> None:
    program = tmp_path / "parallel_test"
    sources = ["tests/parallel_test.cpp", "common/parallel.cpp", "common/cpu_isa.cpp"]
    built_with(["-fsanitize=thread"], sources, program)
    result = run([program])
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        result = run(["setarch", os.uname().machine, "-R", program])  # this sanitizer needs unrandomised addresses
    if "unexpected memory mapping" in result.stderr or "failed to set personality" in result.stderr:
        pytest.skip("the thread sanitizer cannot map its memory on this kernel")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "parallel backend: threads" in result.stdout
