"""Records the launches of a call, so that they can be repeated (tdc_fast/ops/replay.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

# Of an address: which tensor of a call it lies in, and how many bytes past its first; KeyError if that is not certain.
Place = Callable[[int], tuple[int, int]]


class Again(NamedTuple):
    """Launches with the tensors of another call.

    Attributes:
        run: Starts them, given the tensors of a call, their addresses and a stream.
        form: What they are made of, where the extension in C++ (tdc_fast/ops/host_sources) can start them itself.
    """

    run: Callable[[list[Any], list[int], int], None]
    form: Any = None


class Recorded(Protocol):
    """Launches that can be repeated."""

    def again(self, place: Place) -> Again | None:
        """What repeats them with other tensors, as well aligned; None where that cannot be done."""


class _Recording(threading.local):
    launches: list[Recorded] | None = None


_recording = _Recording()


def note(launches: Recorded) -> None:
    """Called by everything that launches, at each launch."""
    if _recording.launches is not None:
        _recording.launches.append(launches)


def record_into(launches: list[Recorded] | None) -> None:
    """Adds the launches that this thread starts from now on to a list; None ends that."""
    _recording.launches = launches
