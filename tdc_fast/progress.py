"""Progress of long work: a bar on a terminal, and lines with the time left where output goes to a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 15.0


def duration(seconds: float) -> str:
    """A duration in words, such as "45 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def on_terminal() -> bool:
    """Whether to show bars: what is printed goes to a terminal too, not into a file or through `tee`."""
    return sys.stderr.isatty() and sys.stdout.isatty()


class Progress:
    """Shows how much of some work is done. A context manager; the bar is on stderr, the lines are on stdout.

    Args:
        what: what is done, such as "drawing images".
        total: how many steps of work there are.
        shown: False shows nothing.
        unit: what a step is, for the bar.
    """

    def __init__(self, what: str, total: int, *, shown: bool = True, unit: str = "step") -> None:
        self._what, self._total, self._shown = what, total, shown
        self._done = 0
        self._began = self._said = time.perf_counter()
        self._bar: Any = None
        if shown and on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """Report finished steps.

        Args:
            count: steps since the last call.
            note: shown beside the progress, such as the result so far.
        """
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note)
            return
        now = time.perf_counter()
        if self._shown and (now - self._said >= SECONDS_BETWEEN_LINES or self._done == self._total):
            self._said = now
            left = (now - self._began) / self._done * (self._total - self._done)
            parts = [f"{self._what}: {self._done / self._total:.0%}", note, f"{duration(left)} left" if left else ""]
            print(", ".join(part for part in parts if part), flush=True)
