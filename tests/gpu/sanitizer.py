"""Finds compute-sanitizer and starts runs of `tests.gpu.sanitized` under it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# Backend, tool. What TMA writes and wgmma reads is not what racecheck watches.
RUNS = [*itertools.product(("triton", "cuda"), ("memcheck", "racecheck")), ("hopper", "memcheck")]
SECONDS = 240  # for a run; all go on together, beside the other tests
FOUND = 86  # the exit code asked of compute-sanitizer when it has found something


def program() -> str | None:
    """compute-sanitizer from the PATH, or where the CUDA toolkit puts it."""
    installed = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(installed) if installed.is_file() else None)


@dataclass(frozen=True)
class Watched:
    """A run under way and the file that it writes to."""

    process: subprocess.Popen[bytes]
    output: Path
    end: float  # of time.monotonic(): when to wait no longer

    def wait(self) -> int:
        """The exit code. Raises subprocess.TimeoutExpired when the time is up."""
        return self.process.wait(max(0.0, self.end - time.monotonic()))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def start(backend: str, tool: str, output: Path) -> Watched:
    """Without torch's cache every tensor is an allocation of its own, whose ends are watched."""
    command = [str(program()), f"--tool={tool}", f"--error-exitcode={FOUND}", "--print-limit=5"]
    command += [sys.executable, "-m", "tests.gpu.sanitized", backend]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return Watched(process, output, time.monotonic() + SECONDS)


def start_all(folder: Path) -> dict[tuple[str, str], Watched]:
    """All runs that serve the GPU at once: they are slow and need little of it."""
    return {pair: start(*pair, folder / "-".join(pair)) for pair in RUNS if serves(pair[0])}


def serves(backend: str) -> bool:
    """Whether a backend runs on the current GPU."""
    return backend != "hopper" or torch.cuda.get_device_capability() == (9, 0)
