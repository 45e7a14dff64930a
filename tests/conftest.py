"""Shared set-up: the gpu marker, threads that leave a small machine usable, and what parallel test processes share."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import generated

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # test processes, and what they start, share the cores
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)

FOLDER = Path(__file__).parent
# Files that take longest begin first, so that parallel processes end together (`-n 2 --dist loadfile`).
LONGEST = (
    "emulator/test_sanitized",
    "sanitizers",
    "interpreter",
    "compile_only",
    "emulator",
    "training",
    "distributed",
    "bench",
    "reports",
    "native",
    "examples",
    "experiments",
    "test_",
)

# What `make test-fast` leaves out: compilers, emulators, benches, whole training runs, and the log of inputs tried.
SLOW = (
    "bench",
    "compile_only",
    "distributed/test_training.py",
    "distributed/test_torchrun.py",
    "emulator",
    "examples",
    "experiments",
    "gpu/test_launchers.py",
    "interpreter",
    "native",
    "reports",
    "sanitizers",
    "serving/test_page.py",
    "serving/test_serve_command.py",
    "test_encode.py",
    "test_prune.py",
    "training/test_grouping.py",
    "training/test_resume.py",
    "training/test_step.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "try N times as many examples in the generated tests of tests/reports, and others in every run"
    parser.addoption("--fuzz-factor", type=int, default=1, metavar="N", help=words)


def pytest_configure(config: pytest.Config) -> None:
    """Sets how many examples generated tests try, and gives all test processes one folder for the emulator's builds and
    one for the extension in C++, which exist once whole or not at all, and one for what torch.compile makes.
    """
    generated.factor = config.getoption("--fuzz-factor")
    # Ctrl-C has to reach the commands under test also where it is ignored here, as in `make test &`.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # torch.compile believes what the processor says of its vectors, and compiles no program for each kind to see.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    # What torch.compile kept of another version of the operators has other arguments than they have here.
    for variable in ("TDC_EMULATOR_BUILD", "TDC_HOST_BUILD", "TORCHINDUCTOR_CACHE_DIR"):
        if variable not in os.environ:
            folder = tempfile.TemporaryDirectory(prefix=variable.lower())
            os.environ[variable] = folder.name
            config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.path))
    for item in items:
        if _place(item.path).startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@functools.cache
def _place(file: Path) -> str:
    """A file's path below tests/."""
    return file.relative_to(FOLDER).as_posix() if file.is_relative_to(FOLDER) else ""


@functools.cache
def _turn(file: Path) -> int:
    return next((turn for turn, start in enumerate(LONGEST) if _place(file).startswith(start)), len(LONGEST))


@pytest.fixture
def nan_filled_memory():
    """Fills what torch.empty returns with NaN, so that an output element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def host_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the extension in C++ repeat the calls of a test, on every device."""
    from tdc_fast.ops import backends, cuda_nvrtc, host

    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv(host.VARIABLE, "on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda_nvrtc.CACHE_VARIABLE, os.environ["TDC_HOST_BUILD"])
        assert host.extension(torch.device("cpu")) is not None
    backends.forget()
    yield
    backends.forget()


@pytest.fixture(params=["in Python", "in C++"])
def repeating(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test twice: calls are repeated in Python, and by the extension in C++."""
    from tdc_fast.ops import backends, host

    if request.param == "in C++":
        request.getfixturevalue("host_extension")
    else:
        monkeypatch.setenv(host.VARIABLE, "off")
        backends.forget()
