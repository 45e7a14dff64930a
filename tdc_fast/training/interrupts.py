"""Ctrl-C and SIGTERM as a request to stop at the next step boundary."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on request after saving; the message says how to continue."""


def how_to_continue(run: Path) -> str:
    """The command that continues a run."""
    return f"continue with: python -m tdc_fast.train --resume {run}"


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM only sets `requested`; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
