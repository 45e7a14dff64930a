"""The protocol of an agent: what proposes widths in a pruning search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tdc_fast.pruning.task import Answer, Proposal, Task


class Agent(Protocol):
    """Decides which widths are tried next. Any object with a name and this method will do.

    An agent keeps no state of the search: everything it may use is in the task, which holds the memory of earlier
    rounds (each trial's score, MACs, and what the projection changed, `Trial.moved`). So a search that was killed can
    be resumed, and the same seed gives the same search.

    Two attributes are optional: `one_shot = True` for an agent with a single proposal whatever the memory holds, and
    `measures = True` for one that needs the measured loss rise of every unit (`Task.measured`) before the first
    round.

    Attributes:
        name: written into the memory.
    """

    name: str

    def propose(self, task: Task, count: int) -> Sequence[Proposal] | Answer:
        """Return proposals for the task's next round, each with a width in channels for every unit.

        They need not meet the budget or the units' steps: the search moves each to the nearest widths that do. Random
        numbers should come from `task.rng()` alone, so that the search is repeatable.

        Args:
            task: the group's task.
            count: how many proposals are wanted; 1 to `count` are accepted.

        Raises:
            AgentFailed: it has no proposal; another agent may stand in.
        """


class AgentFailed(Exception):
    """An agent has no proposal in this round for a reason outside the task, such as a service that is down.

    Args:
        reason: why, in words.
        notes: what happened before, for the memory.
        calls: calls to a service that were made.
    """

    def __init__(self, reason: str, notes: Sequence[str] = (), calls: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.notes, self.calls = reason, tuple(notes), calls
