"""compute-sanitizer finds no access out of bounds and no race in shared memory in any kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import sanitized

ROOT = Path(__file__).resolve().parents[2]
FOUND = 86  # the exit code asked of compute-sanitizer when it has found something
SECONDS = 75


def sanitizer() -> str | None:
    """compute-sanitizer from the PATH, or where the CUDA toolkit puts it."""
    installed = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(installed) if installed.is_file() else None)


@pytest.mark.gpu
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed (it comes with the CUDA toolkit)")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_it_finds_nothing(backend: str, tool: str) -> None:
    command = [str(sanitizer()), f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=5"]
    program = [sys.executable, "-m", "tests.gpu.sanitized", backend]
    # Without torch's cache every tensor is an allocation of its own, whose ends are watched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    try:
        result = subprocess.run(
            [*command, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} needs more than {SECONDS} s on this machine")
    output = result.stdout + result.stderr
    if "Device not supported" in output or "not supported on this" in output:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert result.returncode == 0, output[-4000:]
    assert f"ran {len(sanitized.CASES)} cases" in output or "not run:" in output, output[-2000:]


def test_the_watched_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run: the same program with the reference backend on the CPU."""
    sanitized.main("reference", "cpu")
    assert f"ran {len(sanitized.CASES)} cases on reference" in capsys.readouterr().out
