"""Timing on a device: the order of calls, CUDA graphs, streams and time limits, against a pretended GPU."""

from __future__ import annotations

import time

import pytest
import torch

from bench.gpu import peers
from bench.gpu.timing import Machine, TookTooLong, at_most


def test_a_step_that_takes_too_long_is_interrupted() -> None:
    start = time.monotonic()
    with pytest.raises(TookTooLong), at_most(0.05):
        time.sleep(5)
    assert time.monotonic() - start < 2
    time.sleep(0.06)  # and nothing strikes later


class FakeStream:
    """A stream that notes in what order it is used."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append("wait")

    def __enter__(self) -> None:
        self.log.append("enter")

    def __exit__(self, *_: object) -> None:
        self.log.append("exit")


class FakeEvent:
    """An event that reads the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def machine_with_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, list[str]]:
    """A Machine that takes the code path of a GPU on the CPU, and the log of what it asked torch.cuda for."""
    log: list[str] = []
    stream = FakeStream(log)

    class FakeGraph:
        def capture_begin(self) -> None:
            log.append("begin")

        def capture_end(self) -> None:
            log.append("end")

        def replay(self) -> None:
            log.append("replay")

    for name, value in {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": lambda: FakeStream(log),
        "current_stream": lambda: stream,
        "stream": lambda s: s,
        "synchronize": lambda: log.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    machine = Machine("cpu")
    machine.is_cuda, machine._capture_stream, machine._flush = True, FakeStream(log), torch.ones(4)
    return machine, log


def test_on_a_gpu_every_candidate_starts_from_an_idle_device_and_a_flushed_cache(machine_with_a_pretended_gpu) -> None:
    machine, log = machine_with_a_pretended_gpu

    def call(name: str) -> None:
        log.append(f"{name} {machine._flush.any().item()}")
        machine._flush.fill_(1)

    candidates = {name: lambda name=name: call(name) for name in "ab"}
    times = machine.times(candidates, flush=True, seconds=0, least=2)
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    warm = ["a True", "b True", "synchronize"]
    first = ["synchronize", "a False", "synchronize", "b False", "synchronize"]
    second = ["synchronize", "b False", "synchronize", "a False", "synchronize"]
    assert log == [*warm, *first, *second]


def test_on_a_gpu_a_function_is_warmed_up_then_captured_once_and_replayed(machine_with_a_pretended_gpu) -> None:
    machine, log = machine_with_a_pretended_gpu
    replay = machine.captured(lambda: log.append("call"))
    assert log == ["wait", "enter", *["call"] * 3, "synchronize", "begin", "call", "end", "exit", "wait"]
    log.clear()
    replay()
    assert log == ["replay"]

    def fails() -> None:
        raise RuntimeError("not while capturing")

    log.clear()
    with pytest.raises(RuntimeError, match="not while capturing"):
        machine.captured(fails)


def test_on_a_gpu_a_failing_capture_ends_with_its_own_error(machine_with_a_pretended_gpu, monkeypatch) -> None:
    machine, log = machine_with_a_pretended_gpu

    def spoilt(_: object) -> None:
        log.append("end")
        raise RuntimeError("capture invalidated")

    def fails() -> None:
        if "begin" in log:
            raise RuntimeError("not while capturing")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", spoilt)
    with pytest.raises(RuntimeError, match="not while capturing"):
        machine.captured(fails)
    assert log[-3:] == ["begin", "end", "exit"]


def test_on_a_gpu_streams_start_after_what_was_queued_and_are_joined(machine_with_a_pretended_gpu) -> None:
    machine, log = machine_with_a_pretended_gpu
    run = peers.on_streams(machine, [lambda: log.append("a"), lambda: log.append("b")])
    run()
    assert log == ["wait", "wait", "enter", "a", "exit", "enter", "b", "exit", "wait", "wait"]
