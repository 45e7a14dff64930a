"""A search for widths on several processes: the first one searches, all of them measure importance and scores.

One process asks the agent and writes the memory, so the decisions are those of a single process, which are made from
the same numbers. (On a GPU the last bits of a score may depend on how many candidates are scored in one pass.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from tdc_fast.distributed import LostProcess, World
from tdc_fast.nn.macs import MacCounter
from tdc_fast.pruning.importance import Importance
from tdc_fast.pruning.scoring import Scorer
from tdc_fast.pruning.task import Task, Widths

R = TypeVar("R")
Interval = tuple[int, int]
_IMPORTANCE, _SCORES = "importance", "scores"  # what is measured


class ParallelSearch:
    """Shares out the measurements of a search.

    Args:
        world: the processes; all make one of the same base and data.
        taylor: makes what measures the importance on the timesteps of a group, given the interval.
        scorer: makes what scores candidates; not called where nothing is scored.
    """

    def __init__(
        self, world: World, taylor: Callable[[], Callable[[Interval], Importance]], scorer: Callable[[], Scorer]
    ) -> None:
        self._world, self._make_taylor, self._make_scorer = world, taylor, scorer
        self._taylor: Callable[[Interval], Importance] | None = None
        self._scorer: Scorer | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self._world.alone

    def run(self, search: Callable[[], R]) -> R:
        """Run a search in the first process while the others measure for it; all call this, and all get its result."""
        if self._world.alone:
            return search()
        if not self._world.first:
            while (work := self._world.from_first(_nothing)) is not None:
                self._share(*work)
            return self._world.from_first(_nothing)

        def whole_search() -> R:
            try:
                return search()
            finally:
                with suppress(LostProcess):
                    self._world.from_first(_nothing)

        return self._world.from_first(whole_search)

    def importances(self, intervals: Sequence[Interval]) -> tuple[list[Importance], int]:
        """The importance on the timesteps of each interval, and the MACs that measuring took. The first calls it."""
        found = self._shared(_IMPORTANCE, None, intervals)
        return [importance for importance, _ in found], sum(macs for _, macs in found)

    def sharing(self, scorer: Scorer) -> Scorer:
        """A scorer that has its candidates scored by all processes. The first calls it."""
        self._scorer = scorer
        return _SharedScorer(scorer.samples, self)

    def scores(self, task: Task, candidates: Sequence[Widths]) -> list[float]:
        """The scores of candidates. The first calls it."""
        # What the scores depend on; the memory may be long.
        return self._shared(_SCORES, dataclasses.replace(task, memory=(), earlier=(), measured=None), candidates)

    def _shared(self, kind: str, about: Any, items: Sequence[Any]) -> list[Any]:
        with self._world.exchange():
            self._world.from_first(lambda: (kind, about, list(items)))
            parts = self._share(kind, about, list(items))
        results: list[Any] = [None] * len(items)
        for rank, (part, error) in enumerate(parts):
            if error is not None:
                raise error
            results[rank :: self._world.size] = part
        return results

    def _share(self, kind: str, about: Any, items: list[Any]) -> list[tuple[list[Any], BaseException | None]]:
        """Measure this process's share of the items; the first process gets all."""
        own = items[self._world.rank :: self._world.size]
        try:
            outcome: tuple[list[Any], BaseException | None] = (self._measured(kind, about, own) if own else [], None)
        except (Exception, KeyboardInterrupt) as error:  # the others wait for this share
            outcome = [], error
        return self._world.to_first(outcome, "set-up")

    def _measured(self, kind: str, about: Any, own: list[Any]) -> list[Any]:
        if kind == _SCORES:
            self._scorer = self._scorer or self._make_scorer()
            return list(self._scorer.score(about, own))
        self._taylor = self._taylor or self._make_taylor()
        found = []
        for interval in own:
            with MacCounter() as counter:
                importance = self._taylor(interval)
            found.append((importance, counter.macs))
        return found


class _SharedScorer:
    """See `ParallelSearch.sharing`."""

    def __init__(self, samples: int, search: ParallelSearch) -> None:
        self.samples, self._search = samples, search

    def score(
        self, task: Task, candidates: Sequence[Widths], advance: Callable[[int], None] = lambda count: None
    ) -> Sequence[float]:
        """See `Scorer.score`."""
        scores = self._search.scores(task, candidates)
        advance(len(candidates))
        return scores


def _nothing() -> Any:
    return None
