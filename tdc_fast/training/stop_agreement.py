"""When several processes agree whether to stop: about once a second, so that a step never waits for it."""

from __future__ import annotations

import time

from tdc_fast.distributed import World

_SECONDS = 1.0
_MAX_STEPS = 1000


class StopAgreement:
    """Lets all processes of a run stop after the same step, whichever of them a signal reached.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._next: int | None = None
        self._last = (0, time.monotonic())

    def stops_at(self, step: int, requested: bool, waits: bool) -> bool:
        """Whether to stop after a step. All processes call it after every step.

        Args:
            step: the number of the step.
            requested: whether this process is asked to.
            waits: whether the processes wait for each other after this step anyway, as for a checkpoint.
        """
        if self._world.alone:
            return requested
        if self._next is not None and step < self._next and not waits:
            return False
        steps, seconds = step - self._last[0], max(time.monotonic() - self._last[1], 1e-6)
        ahead = 1 if self._next is None else min(max(int(steps * _SECONDS / seconds), 1), _MAX_STEPS)
        stops, ahead = self._world.largest(int(requested), ahead if self._world.first else 0)
        self._last, self._next = (step, time.monotonic()), step + ahead
        return bool(stops)
