"""How a run ends early: at the next step boundary after a signal, or where files cannot be written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from tdc_fast.distributed import LostProcess, is_of_all, on_all
from tdc_fast.runs.checkpoint import finished_steps
from tdc_fast.runs.directory import RunDirectory

_HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none


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
        kind = LostProcess if isinstance(error, LostProcess) else OSError
        told = kind(f"{cause}; {_last_checkpoint(run)}. Once that is mended, {command or how_to_continue(run.path)}")
        raise (on_all(told) if is_of_all(error) else told) from error


@contextmanager
def interrupts_named(run: RunDirectory, stage: str = "") -> Iterator[None]:
    """Let a Ctrl-C that stops the block at once say where it did, what is saved, and how to go on.

    Args:
        run: the run that the block works on.
        stage: the stage that the block trains; "" outside of them, where everything is saved already.

    Raises:
        TrainingInterrupted: in place of any other KeyboardInterrupt.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt as interrupt:
        where = f"stopped at once in stage {stage}; {_last_checkpoint(run)}" if stage else "stopped between two stages"
        told = TrainingInterrupted(f"{where}; {how_to_continue(run.path)}")
        raise (on_all(told) if is_of_all(interrupt) else told) from interrupt


def _last_checkpoint(run: RunDirectory) -> str:
    stages = ("experts", "base") if run.config.groups else ("base",)
    saved = ((stage, finished_steps(run.stage_directory(stage))) for stage in stages)
    stage, steps = next((found for found in saved if found[1]), ("", []))
    return f"the last good checkpoint is step {steps[-1]} of stage {stage}" if steps else "there is no checkpoint yet"


class StopRequest:
    """Context manager: the first SIGINT, SIGTERM or SIGHUP only sets `requested`; a second one acts as usual.

    But for SIGHUP, which both the kernel and the shell may send when a terminal closes: further ones change nothing.
    Signals that were ignored, as SIGHUP is under nohup, stay so. Outside the main thread, where Python allows no
    handlers, it does nothing.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, *_HANGUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore([other for other in self._previous if other not in _HANGUP])
        if number in _HANGUP:
            self._let_go_of_closed_terminals()

    def _let_go_of_closed_terminals(self) -> None:
        """What is printed from here on must not fail, or nothing would be saved."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]
