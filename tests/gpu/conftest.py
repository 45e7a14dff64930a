"""Before the tests that need a GPU: several processes compile their Triton kernels, and the sanitized runs begin.

A test whose kernels hang is named and ends the run, and so does one that leaves the GPU unusable for those after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import sanitizer
from tests.gpu.watching import watched_gpu

ROOT = Path(__file__).resolve().parents[2]
WORTH_IT = 40  # tests on a GPU; for fewer, compiling what they need is faster
SECONDS = 90
HANGS_AFTER = 300.0  # seconds of a test, or as many as its file says by this name


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> None:
    on_gpu = [item for item in request.session.items if item.get_closest_marker("gpu")]
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


@pytest.fixture(autouse=True)
def gpu_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    name, capture = request.node.nodeid, request.config.pluginmanager.getplugin("capturemanager")

    def end() -> None:
        with capture.global_and_fixture_disabled():
            print(f"\nthe GPU does not answer: {name}", flush=True)
        os._exit(3)

    def stop(error: RuntimeError) -> None:
        request.session.shouldstop = f"{name} leaves the GPU unusable: {error}"

    with watched_gpu(getattr(request.module, "HANGS_AFTER", HANGS_AFTER), end, stop):
        yield
