"""Evolution: crossover and mutation of the best trials."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tdc_fast.pruning.agents.starts import distinct, starting_proposals
from tdc_fast.pruning.task import Proposal, Task, Trial


class Evolution:
    """Proposes children of the best trials so far: each unit from one of two parents, then some units mutated.

    Args:
        parents: number of best trials that may be parents.
        stride: a mutation widens or narrows a unit by one to this many steps; the projection restores the budget.
    """

    name = "evolution"

    def __init__(self, parents: int = 6, stride: int = 2) -> None:
        self.parents, self.stride = parents, stride

    def propose(self, task: Task, count: int) -> list[Proposal]:
        """Return `count` children, or starting points while nothing is scored."""
        scored = sorted((t for t in task.memory if t.score is not None), key=lambda trial: trial.score or 0.0)
        if not scored:
            return starting_proposals(task, count)
        return distinct(task, [], self._children(task, scored[: self.parents]), count)

    def _children(self, task: Task, parents: list[Trial]) -> Iterator[Proposal]:
        rng = task.rng()
        while True:
            one, other = (parents[int(min(rng.integers(len(parents), size=2)))] for _ in range(2))  # tournaments of two
            child = {}
            mutating = rng.random(len(task.units)) < 2 / len(task.units)
            mutating[rng.integers(len(task.units))] = True
            for unit, mutates in zip(task.units, mutating, strict=True):
                width = (one if rng.random() < 0.5 else other).widths[unit.name]
                if mutates:
                    width += unit.step * int(rng.integers(1, self.stride + 1)) * int(rng.choice([-1, 1]))
                child[unit.name] = int(np.clip(width, 0, unit.channels))
            yield Proposal(child, f"child of {_name(one)} and {_name(other)}")


def _name(trial: Trial) -> str:
    return f"{trial.round}.{trial.candidate}"
