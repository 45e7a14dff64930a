"""What captures work on a device and replays it: the interface, and CUDA graphs behind it."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree

_WAITS = "called a synchronizing CUDA operation"
_NOTICE = "Synchronization debug mode"


class Recording(Protocol):
    """Captured work.

    Attributes:
        outputs: what the function returned when it was captured; every replay writes these tensors anew.
    """

    outputs: Any

    def replay(self) -> None:
        """Queue the work once on the current stream."""


class Capture(Protocol):
    """Captures work on devices. `CudaCapture` is the one of real devices; tests bring one of their own."""

    def serves(self, device: torch.device) -> bool:
        """Whether work on a device can be captured."""

    @property
    def capturing(self) -> bool:
        """Whether this thread is inside `record`."""

    def begin(self, device: torch.device) -> None:
        """Called before a replay and the copies of its inputs: they come after earlier replays, on any stream."""

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, str]:
        """Run a function as it is, where it will be captured.

        Returns:
            Its result, and what it did that cannot be captured, "" if nothing was noticed.
        """

    def record(
        self, function: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator]
    ) -> Recording:
        """Capture a function: what it queues is recorded and not executed.

        Args:
            function: the work.
            device: where it runs.
            generators: those that it draws from, besides the default generator of the device.

        Raises:
            RuntimeError: it did something that cannot be captured; the device can be used as before.
        """


class CudaCapture:
    """Captures into CUDA graphs. All graphs of a device share one memory pool."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._last: dict[torch.device, Any] = {}
        self._graphs: dict[torch.device, WeakSet[Any]] = {}
        self._thread: int | None = None

    def serves(self, device: torch.device) -> bool:
        """Whether it is a CUDA device that torch can use."""
        return device.type == "cuda" and torch.cuda.is_available()

    @property
    def capturing(self) -> bool:
        """Whether this thread is inside `record`."""
        return self._thread == threading.get_ident()

    def begin(self, device: torch.device) -> None:
        """Make the current stream wait for the last replay, as graphs share their memory."""
        current, last = torch.cuda.current_stream(device), self._last.get(device)
        if last is not None and last != current:
            current.wait_stream(last)
        self._last[device] = current

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, str]:
        """Run a function on the stream of captures; see `Capture.warm_up`. Notices whether it waits for the device."""
        self.begin(device)
        current, stream, waits = torch.cuda.current_stream(device), self._stream(device), list[str]()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), _noting_waits(waits):
            result = function()
        current.wait_stream(stream)
        for value in _pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(current)
        return result, f"it waits for the device in {waits[0]}" if waits else ""

    def record(
        self, function: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator]
    ) -> Recording:
        """Capture a function; see `Capture.record`."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        stream = self._stream(device)
        states = [(g, g.clone_state()) for g in (torch.cuda.default_generators[stream.device_index], *generators)]
        with _between_captures, torch.cuda.device(device):
            torch.cuda.synchronize()
            gc.collect()  # nothing of an earlier graph may be freed inside the capture
            torch.cuda.empty_cache()  # what the warm-up kept is memory for the graph
            with torch.cuda.stream(stream):
                try:
                    self._thread = threading.get_ident()
                    # "thread_local": the threads that load data, and those of the backward, go on as usual.
                    graph.capture_begin(pool=self._pool(device), capture_error_mode="thread_local")
                    try:
                        outputs = function()
                    except BaseException:
                        with suppress(RuntimeError):  # it says only that the capture was invalidated
                            graph.capture_end()
                        raise
                    graph.capture_end()
                except BaseException:
                    self._streams.pop(device)
                    with suppress(RuntimeError):  # the generators still take draws for captured ones
                        for generator, state in states:
                            generator.graphsafe_set_state(state)
                    raise
                finally:
                    self._thread = None
        self._graphs.setdefault(device, WeakSet()).add(graph)
        return _CudaRecording(graph, outputs)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pool(self, device: torch.device) -> Any:
        """The pool of the graphs there are; a new one where there are none, as a pool ends with its last graph."""
        for graph in self._graphs.get(device, ()):
            return graph.pool()
        return torch.cuda.graph_pool_handle()


@dataclass
class _CudaRecording:
    graph: Any
    outputs: Any

    def replay(self) -> None:
        self.graph.replay()


@contextmanager
def _noting_waits(found: list[str]) -> Iterator[None]:
    """Append the place of every operation in the block that waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if _WAITS in text:
            found.append(f"{warning.filename}:{warning.lineno}")
        elif not text.startswith(_NOTICE):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


_between_captures = threading.RLock()
_capture: Capture = CudaCapture()


def current_capture() -> Capture:
    """What captures here."""
    return _capture


def captures_on(device: torch.device) -> bool:
    """Whether work on a device can be captured."""
    return _capture.serves(device)


def is_capturing() -> bool:
    """Whether what this thread queues now is captured, by a `Graphed` function or by torch.cuda.graph."""
    return _capture.capturing or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@contextmanager
def use_capture(capture: Capture) -> Iterator[None]:
    """Within the block this captures, also on devices that have no graphs: tests record on the CPU so."""
    global _capture
    before, _capture = _capture, capture
    try:
        yield
    finally:
        _capture = before


@contextmanager
def outside_captures() -> Iterator[None]:
    """For a thread beside the one that captures: the block runs while nothing is captured.

    CUDA forbids some calls while a graph is captured, pinning memory among them, whatever thread makes them.
    """
    with _between_captures:
        yield
