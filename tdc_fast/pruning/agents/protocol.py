"""The seam of the pruning search: something that proposes widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tdc_fast.pruning.task import Answer, Proposal, Task


class Agent(Protocol):
    """Decides what is tried next. Any object with a name and this method will do.

    An agent holds no state of the search: everything it may know is in the task, which carries the memory of the rounds
    before (each trial's score, MACs, and what the projection moved, `Trial.moved`). So a search that was killed goes
    on where it was, and the same seed gives the same search.

    Two attributes are optional: `one_shot = True` for an agent that has a single proposal whatever the memory says, and
    `measures = True` for one that wants the measured loss rise of every unit (`Task.measured`) before the first round.
    """

    name: str

    def propose(self, task: Task, count: int) -> Sequence[Proposal] | Answer:
        """1 to `count` proposals for the task's next round, each with a width in channels for every unit.

        They need not meet the budget or the units' steps: the search moves each to the nearest widths that do. Draw
        from `task.rng()` alone, so that the search repeats. Raises AgentFailed when it has none; another agent may
        stand in.
        """


class AgentFailed(Exception):
    """An agent has nothing to propose in this round, through no fault of the task: a service is down, say."""

    def __init__(self, reason: str, notes: Sequence[str] = (), calls: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.notes, self.calls = reason, tuple(notes), calls
