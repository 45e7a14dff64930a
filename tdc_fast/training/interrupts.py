"""How a run ends early: Ctrl-C and SIGTERM at the next step boundary, and files that cannot be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from tdc_fast.runs.checkpoint import finished_steps
from tdc_fast.runs.directory import RunDirectory


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on request after saving; the message says how to continue."""


def how_to_continue(run: Path) -> str:
    """The command that continues a run."""
    return f"continue with: python -m tdc_fast.train --resume {run}"


@contextmanager
def saying_what_is_safe(run: RunDirectory, command: str = "") -> Iterator[None]:
    """Let the error for a file that cannot be written or read also say what of the run is safe, and how to go on.

    Args:
        run: the run that the block works on.
        command: how to go on; "" is `how_to_continue`.

    Raises:
        OSError: in place of any other.
    """
    try:
        yield
    except OSError as error:
        cause = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        stages = ("experts", "base") if run.config.groups else ("base",)
        saved = ((stage, finished_steps(run.stage_directory(stage))) for stage in stages)
        stage, steps = next((found for found in saved if found[1]), ("", []))
        last = (
            f"the last good checkpoint is step {steps[-1]} of stage {stage}" if steps else "there is no checkpoint yet"
        )
        raise OSError(f"{cause}; {last}. Once that is mended, {command or how_to_continue(run.path)}") from error


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
