"""One proposal, without a search: the widths that keep the most importance."""

from __future__ import annotations

from tdc_fast.pruning.task import Proposal, Task


class MostImportant:
    """Proposes the widths that keep the most importance within the budget, solved exactly; ignores the memory.

    Args:
        name: the importance of the task, "taylor" or "magnitude".
    """

    one_shot = True

    def __init__(self, name: str = "taylor") -> None:
        self.name = name

    def propose(self, task: Task, count: int) -> list[Proposal]:
        """Return the one proposal."""
        return [Proposal(task.most_important().widths, "keeps the most importance")]
