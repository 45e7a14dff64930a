"""Starting points of a search: the most important widths, the best of earlier groups, and variations of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from tdc_fast.pruning.task import Proposal, Task, Trial, as_key, best_of

SPREAD = 0.7
"""Standard deviation of the logarithm of the factors on the units' importance."""


def starting_proposals(task: Task, count: int) -> list[Proposal]:
    """Proposals for a first round, all different as far as the budget allows.

    The most important widths; the best widths of each earlier group, latest first, for up to half of the round; and
    for the rest the most important widths with each unit's importance multiplied by a random factor.

    Args:
        task: the group's task.
        count: number of proposals.
    """
    first = [Proposal(task.most_important().widths, "keeps the most importance")] if task.round == 0 else []
    inherited = list(_inherited(task))[: count // 2]
    return distinct(task, [*first, *inherited], _reweighted(task), count)


def distinct(task: Task, first: list[Proposal], more: Iterator[Proposal], count: int) -> list[Proposal]:
    """Proposals whose projections differ from each other and from all trials so far.

    After 8 draws per proposal repetitions are accepted, since a small space may have nothing new.

    Args:
        task: the group's task.
        first: proposals to take first.
        more: an endless supply of others.
        count: number of proposals.
    """
    seen = {as_key(task.units, trial.widths) for trial in task.memory}
    landed: dict[tuple[int, ...], tuple[int, ...]] = {}  # proposed -> tried: projecting is slower than drawing
    chosen: list[Proposal] = []
    for place, proposal in enumerate(chain(first, more)):
        if len(chosen) == count:
            break
        proposed = as_key(task.units, proposal.widths)
        if proposed not in landed:
            landed[proposed] = as_key(task.units, task.project(proposal.widths).widths)
        if landed[proposed] not in seen or place >= len(first) + 8 * count:
            seen.add(landed[proposed])
            chosen.append(proposal)
    return chosen


def _reweighted(task: Task) -> Iterator[Proposal]:
    rng = task.rng()
    while True:
        factors = np.exp(SPREAD * rng.standard_normal(len(task.units)))
        named = {unit.name: float(factor) for unit, factor in zip(task.units, factors, strict=True)}
        yield Proposal(task.most_important(named).widths, "most importance, with randomly weighted units")


def _inherited(task: Task) -> Iterator[Proposal]:
    for group in sorted({trial.group for trial in task.earlier}, reverse=True):
        best = best_of([trial for trial in task.earlier if trial.group == group])
        if best is not None:
            yield Proposal(rescaled(task, best), f"the best of group {group}, scaled to this budget")


def rescaled(task: Task, trial: Trial) -> dict[str, int]:
    """A trial's widths, all multiplied by the factor that brings their MACs nearest to the task's budget."""

    def scaled(factor: float) -> dict[str, int]:
        return {
            unit.name: min(int(factor * trial.widths[unit.name] / unit.step + 0.5) * unit.step, unit.channels)
            for unit in task.units
        }

    factors = np.linspace(0.0, 2.0, 201)
    return min((scaled(float(f)) for f in factors), key=lambda widths: abs(task.costs.total(widths) - task.budget))
