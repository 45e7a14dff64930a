"""Other processes that measure for a search: the protocol. `tdc_fast.training.parallel_search` has those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tdc_fast.pruning.importance import Importance
from tdc_fast.pruning.scoring import Scorer


class Helpers(Protocol):
    """What other processes measure for a search, on the same base and data."""

    def importances(self, intervals: Sequence[tuple[int, int]]) -> tuple[list[Importance], int]:
        """The Taylor importance on the timesteps of each interval (start, stop), and the MACs that it took."""

    def sharing(self, scorer: Scorer) -> Scorer:
        """A scorer with the same results as `scorer` that divides the candidates among the processes."""
