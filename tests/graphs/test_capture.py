"""What `CudaCapture` asks of torch.cuda, in order, on a pretended GPU: warm-up, capture, replay, a failed capture."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch

from tdc_fast.graphs.capture import CudaCapture

DEVICE = torch.device("cuda", 0)


class Generator:
    """A generator that remembers its state's name."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def clone_state(self) -> str:
        return f"state of {self.name}"

    def graphsafe_set_state(self, state: str) -> None:
        self.log.append(f"restored {state}")


class Stream:
    device_index = 0

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> tuple[CudaCapture, list[str]]:
    """A CudaCapture on a pretended GPU, and the log of what it asked for."""
    log: list[str] = []
    current = [Stream(log, "main")]
    count = [0]

    class Graph:
        def __init__(self) -> None:
            count[0] += 1
            self.name = f"graph {count[0]}"

        def register_generator_state(self, generator: Generator) -> None:
            log.append(f"registered {generator.name}")

        def capture_begin(self, pool: str, capture_error_mode: str) -> None:
            log.append(f"begin in {pool}, {capture_error_mode}, on {current[-1].name}")

        def capture_end(self) -> None:
            log.append("end")

        def replay(self) -> None:
            log.append(f"replay on {current[-1].name}")

        def pool(self) -> str:
            return f"the pool of {self.name}"

    @contextmanager
    def stream(chosen: Stream):
        current.append(chosen)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: log.append(f"waits: {mode}"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a new pool")
    monkeypatch.setattr(torch.cuda, "default_generators", [Generator(log, "the default")])
    return CudaCapture(), log


def test_a_warm_up_runs_on_the_stream_of_captures_and_notices_waiting(pretended) -> None:
    capture, log = pretended
    assert capture.warm_up(lambda: log.append("call"), DEVICE) == (None, "")
    assert log == ["side waits for main", "waits: warn", "call", "waits: 0", "main waits for side"]

    def waiting() -> int:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1)", stacklevel=1)
        return 3

    result, obstacle = capture.warm_up(waiting, DEVICE)
    assert result == 3 and obstacle.startswith(f"it waits for the device in {__file__}:")
    with pytest.warns(UserWarning, match="of the function's own"):
        assert capture.warm_up(lambda: warnings.warn("of the function's own", stacklevel=1), DEVICE)[1] == ""


def test_a_capture_begins_on_an_idle_device_and_does_not_forbid_other_threads_their_work(pretended) -> None:
    capture, log = pretended
    inside = []
    recording = capture.record(
        lambda: inside.append(capture.capturing) or "outputs", DEVICE, [Generator(log, "another")]
    )
    assert log == [
        "registered another", "synchronize", "empty", "begin in a new pool, thread_local, on side", "end",
    ]  # fmt: skip
    assert recording.outputs == "outputs" and inside == [True] and not capture.capturing
    recording.replay()
    assert log[-1] == "replay on main"


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(pretended) -> None:
    capture, log = pretended
    first = capture.record(lambda: None, DEVICE, [])
    second = capture.record(lambda: None, DEVICE, [])
    assert "begin in the pool of graph 1, thread_local, on side" in log
    del first, second
    log.clear()
    capture.record(lambda: None, DEVICE, [])
    assert "begin in a new pool, thread_local, on side" in log


def test_replays_on_another_stream_come_after_the_last_one(pretended) -> None:
    capture, log = pretended
    capture.begin(DEVICE)
    assert log == []
    with torch.cuda.stream(Stream(log, "other")):
        capture.begin(DEVICE)
    assert log == ["other waits for main"]


def test_a_failed_capture_ends_and_gives_the_generators_back(pretended) -> None:
    capture, log = pretended

    def fails() -> None:
        raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        capture.record(fails, DEVICE, [Generator(log, "another")])
    assert log[-3:] == ["end", "restored state of the default", "restored state of another"]
    assert not capture.capturing and torch.cuda.current_stream(DEVICE).name == "main"
