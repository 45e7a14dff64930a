"""Before the tests that need a GPU: several processes compile their Triton kernels, and the sanitized runs begin.

A test whose kernels hang is named and ends the run, and so does one that leaves the GPU unusable for those after it.
`python -m tests.gpu.restarting` goes on with the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tdc_fast.ops import cuda_launch
from tests.gpu import hangs, restarting, sanitizer
from tests.gpu.watching import watched_gpu

ROOT = Path(__file__).resolve().parents[2]
WARMED = ("test_networks.py", "test_operators.py", "test_tiles.py")  # whose kernels warm.py compiles
WORTH_IT = 40  # tests of theirs; for fewer, compiling what they need is faster
SECONDS = 90
HANGS_AFTER = 300.0  # seconds of a test, or as many as its file says by this name
TO_BEGIN = 90.0  # more for the first test, which compiles: the host's extension, and kernels that nvcc has not built


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> None:
    on_gpu = [i for i in request.session.items if i.get_closest_marker("gpu") and i.path.name in WARMED]
    if not torch.cuda.is_available() or len(on_gpu) < WORTH_IT:
        return
    count = max(1, min(8, (os.cpu_count() or 2) // 2))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.warm", f"{index}/{count}"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for index in range(count)
    ]  # fmt: skip
    end = time.monotonic() + SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="session", autouse=True)
def watched(
    request: pytest.FixtureRequest, compiled_ahead: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], sanitizer.Watched]]:
    """The runs under compute-sanitizer, by backend and tool; they go on beside the other tests."""
    wanted = any("test_it_finds_nothing" in item.name for item in request.session.items)
    if not wanted or not torch.cuda.is_available() or sanitizer.program() is None:
        yield {}
        return
    runs = sanitizer.start_all(tmp_path_factory.mktemp("sanitizer"))
    yield runs
    for run in runs.values():
        run.stop()


@pytest.fixture(scope="session")
def more_seconds() -> list[float]:
    """What a test may take beside HANGS_AFTER; the first test takes it out."""
    return [TO_BEGIN]


@pytest.fixture(autouse=True)
def gpu_answers(request: pytest.FixtureRequest, more_seconds: list[float]) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    name, capture = request.node.nodeid, request.config.pluginmanager.getplugin("capturemanager")

    def end() -> None:
        restarting.note(name, restarting.HANGS)
        with capture.global_and_fixture_disabled():
            print(f"\nthe GPU does not answer: {name}", flush=True)
            faulthandler.dump_traceback(sys.__stderr__)
        os._exit(3)

    def stop(error: RuntimeError) -> None:
        restarting.note(name, restarting.BREAKS, str(error))
        request.session.shouldstop = f"{name} leaves the GPU unusable: {error}"

    seconds = getattr(request.module, "HANGS_AFTER", HANGS_AFTER) + (more_seconds.pop() if more_seconds else 0.0)
    with contextlib.ExitStack() as stack:
        if restarting.ALONE in os.environ and torch.cuda.get_device_capability() == (9, 0):
            seconds = 0.8 * restarting.SECONDS_ALONE
            stack.enter_context(cuda_launch.use_launcher(hangs.Reporting()))
        stack.enter_context(watched_gpu(seconds, end, stop))
        yield
