"""Random widths: the control that any agent should beat."""

from __future__ import annotations

from collections.abc import Iterator

from tdc_fast.pruning.agents.starts import distinct
from tdc_fast.pruning.task import Proposal, Task


class RandomWidths:
    """Draws every unit's width uniformly from the allowed ones; the projection then moves it onto the budget."""

    name = "random"

    def propose(self, task: Task, count: int) -> list[Proposal]:
        """Draw `count` proposals."""
        return distinct(task, [], self._draws(task), count)

    def _draws(self, task: Task) -> Iterator[Proposal]:
        rng = task.rng()
        while True:
            yield Proposal({unit.name: int(rng.choice(unit.widths())) for unit in task.units}, "drawn uniformly")
