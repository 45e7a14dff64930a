"""Timing on a device: interleaved candidates, device events, a flushed L2, and a budget of seconds.

As in `bench.compare`, every round times each candidate once, so that clocks and temperature affect all of them equally;
ratios are medians of per-round quotients. On the CPU (a dry run) the same calls run and the host's clock is read.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any

import torch

from bench.compare import Candidate

WARMUP_CALLS = 3  # before a graph is captured: initialisation, autotuning and allocation must be over
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU; while it runs, the host queues the candidate's call
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


class TookTooLong(BaseException):
    """A step took longer than its limit. Not an Exception, so that no `except Exception`, as in compilers, stops it."""


class Budget:
    """Seconds that may still be spent."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(0.0, self._end - time.monotonic())

    def part(self, seconds: float) -> Budget:
        """A budget of `seconds`, or of what is left if that is less."""
        return Budget(min(seconds, self.left()))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in the block after `seconds`; only on the main thread of a system that has SIGALRM."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TookTooLong(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of ours / theirs: below 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


class Machine:
    """One device, and timing on it.

    Attributes:
        device: the torch device.
        is_cuda: whether it is a GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.is_cuda else None
        self._streams: list[Any] = []
        self._capture_stream: Any = torch.cuda.Stream() if self.is_cuda else None

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def times(
        self,
        candidates: Mapping[str, Candidate],
        *,
        flush: bool,
        seconds: float = 0.2,
        rounds: int = 25,
        least: int = 5,
    ) -> dict[str, list[float]]:
        """Milliseconds per candidate and round; each round starts with another candidate.

        Args:
            candidates: the calls by name.
            flush: overwrite the L2 before every call.
            seconds: about how long all rounds together may take.
            rounds: the most rounds.
            least: the fewest rounds.
        """
        names = list(candidates)
        for _ in range(min(2, least - 1)):
            for name in names:
                candidates[name]()
        self.synchronize()
        start = time.perf_counter()
        measured: dict[str, list[float]] = {name: [] for name in names}
        for index in range(rounds):
            first = index % len(names)
            for name, value in self._round(candidates, names[first:] + names[:first], flush).items():
                measured[name].append(value)
            if index + 1 >= least and time.perf_counter() - start > seconds:
                break
        return measured

    def _round(self, candidates: Mapping[str, Candidate], names: list[str], flush: bool) -> dict[str, float]:
        if not self.is_cuda:
            result = {}
            for name in names:
                start = time.perf_counter()
                candidates[name]()
                result[name] = 1e3 * (time.perf_counter() - start)
            return result
        events = {}
        for name in names:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()  # a long queue would hide the host time of the next candidate
            if flush and self._flush is not None:
                self._flush.zero_()
            begin.record()
            candidates[name]()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}

    def captured(self, function: Candidate) -> Candidate:
        """A call that replays `function` from a CUDA graph; on the CPU, the function itself."""
        if not self.is_cuda:
            function()
            return function
        side, graph = self._capture_stream, torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # not torch.cuda.graph, which empties the allocator's cache every time
            for _ in range(WARMUP_CALLS):
                function()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                kept = function()
            except BaseException:
                with suppress(RuntimeError):  # it says only that the capture was invalidated
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)

        def replay(kept: object = kept) -> None:  # what the graph writes lives as long as the graph
            graph.replay()

        return replay

    @contextmanager
    def forked(self, count: int) -> Iterator[list[Any]]:
        """Contexts of `count` streams, which start after what was queued before and are joined at the end."""
        if not self.is_cuda:
            yield [nullcontext() for _ in range(count)]
            return
        while len(self._streams) < count:
            self._streams.append(torch.cuda.Stream())
        current, streams = torch.cuda.current_stream(), self._streams[:count]
        for stream in streams:
            stream.wait_stream(current)
        yield [torch.cuda.stream(stream) for stream in streams]
        for stream in streams:
            current.wait_stream(stream)

    def clocks(self) -> dict[str, float | str]:
        """Clocks (MHz), temperature (C) and power (W) from nvidia-smi; {} when it fails."""
        program = shutil.which("nvidia-smi")
        if not self.is_cuda or program is None:
            return {}
        try:
            command = [program, f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "-i", "0"]
            text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        return {name: _number(value.strip()) for name, value in zip(CLOCKS.split(","), text.split(","), strict=False)}

    def describe(self) -> dict[str, Any]:
        """Name, architecture, multiprocessors, memory and L2 of the device."""
        if not self.is_cuda:
            return {"name": "CPU (dry run)", "multiprocessors": 0}
        p = torch.cuda.get_device_properties(self.device)
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_GiB": round(p.total_memory / 2**30, 1),
            "l2_MiB": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        }

    @cached_property
    def empty_launch(self) -> float:
        """Measured milliseconds of a kernel that does nothing, in a graph, timed like a layer; 0 on the CPU."""
        if not self.is_cuda:
            return 0.0
        empty = self.captured(lambda: torch.cuda._sleep(0))  # its kernel counts clocks, here none
        return statistics.median(self.times({"empty": empty}, flush=True)["empty"])

    def ceilings(self) -> dict[str, float]:
        """Measured limits of the device.

        Returns:
            `copy_TBps`, a copy within its memory (bytes read plus written), `matmul_TFLOPps`, a bf16 matrix product,
            and `empty_launch_ms`.
        """
        size, side = (1 << 31, 8192) if self.is_cuda else (1 << 16, 64)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        measured = self.times({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, flush=False, rounds=10)
        copy, matmul = (statistics.median(measured[name]) for name in ("copy", "matmul"))
        return {
            "copy_TBps": 2 * size / copy / 1e9,
            "matmul_TFLOPps": 2 * side**3 / matmul / 1e9,
            "empty_launch_ms": self.empty_launch,
        }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
