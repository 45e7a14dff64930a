"""Compiles the extension in C++ that repeats calls (host_sources/), against the torch that is installed here.

It cannot come with the package, since it fits one version of torch, Python and compiler. So it is compiled at its first
use, which takes about half a minute, and kept in the same cache as CUDA kernels, under a hash of everything that it
depends on. It appears there whole or not at all, and one process at a time compiles.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tdc_fast.ops.cuda_nvrtc import CACHE_VARIABLE, cache_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SOURCES = Path(__file__).parent / "host_sources"
_OPTIONS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")
_log = logging.getLogger("tdc_fast.host")


def built() -> Path:
    """The extension's file, compiled if it is not in the cache.

    Raises:
        RuntimeError: Why it cannot be compiled here.
    """
    compiler = _compiler()
    path = cache_directory() / f"host-{_digest(compiler)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.with_suffix(".lock")):
            if not path.exists():
                _log.warning("compiling the extension in C++ into %s, once: about half a minute", path.parent)
                _compile(compiler, path)
    except OSError as error:
        raise RuntimeError(f"it cannot be kept in {path.parent}: set {CACHE_VARIABLE} to a folder ({error})") from error
    return path


def _compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else the one that is found."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise RuntimeError("there is no C++ compiler")
    return [found]


def _digest(compiler: list[str]) -> str:
    """A hash of all that the file depends on."""
    facts = (
        torch.__version__, torch.version.git_version, sys.version, platform.machine(), _OPTIONS, compiler,
        _output([*compiler, "--version"]),
    )  # fmt: skip
    digest = hashlib.sha256(repr(facts).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _compile(compiler: list[str], path: Path) -> None:
    folder = Path(torch.__file__).parent
    includes = [folder / "include", folder / "include" / "torch" / "csrc" / "api" / "include"]
    includes.append(Path(sysconfig.get_paths()["include"]))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".host-") as temporary:
        made = Path(temporary) / path.name
        _output(
            [
                *compiler,
                *_OPTIONS,
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                str(_SOURCES / "host.cpp"),
                *(argument for include in includes for argument in ("-isystem", str(include))),
                f"-L{folder / 'lib'}",
                *(f"-l{library}" for library in _LIBRARIES),
                *("-o", str(made)),
            ]
        )
        made.replace(path)


def _output(command: list[str]) -> str:
    """What a compiler prints; RuntimeError with its first error where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit {result.returncode}")
        raise RuntimeError(f"{command[0]} failed: {reason.strip()}")
    return result.stdout


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Holds a lock of all processes that share the cache, where the system has one; it ends with the process."""
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
