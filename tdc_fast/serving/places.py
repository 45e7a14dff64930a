"""How many places a batch has: fewer after memory ran out, and more again later."""

from __future__ import annotations

FIRST_WAIT, LONGEST_WAIT = 60.0, 3600.0
"""Seconds without an error until batches grow again: at first, and at most."""


class Places:
    """The places of a batch. Half of what ran out of memory, then twice as many each time that a while has passed.

    Memory that was short because of somebody else's work comes back; memory that is too small does not. So every time
    that it runs out the wait is twice as long, up to an hour.

    Args:
        most: places that there may be.

    Attributes:
        count: places that there are.
    """

    def __init__(self, most: int) -> None:
        self.count = self._most = most
        self._wait, self._grows_at = FIRST_WAIT, 0.0

    def shrink(self, rows: int, now: float) -> None:
        """Memory ran out in a step of so many rows, at a time in seconds."""
        self.count = max(1, min(self.count, rows // 2))
        self._grows_at = now + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def grow(self, now: float) -> None:
        """Have more places if it is time to try."""
        if self.count < self._most and now >= self._grows_at:
            self.count = min(2 * self.count, self._most)
            self._grows_at = now + self._wait / 2  # the wait after the last error; `_wait` is that after the next
