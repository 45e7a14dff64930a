"""Greedy: narrow the unit whose loss rises least per MAC, or nanosecond, saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from tdc_fast.pruning.agents.starts import distinct
from tdc_fast.pruning.task import Proposal, Task, Trial

SPREAD = 0.4
"""Standard deviation of the logarithm of the factors on the units' sensitivity, for variations."""


class Greedy:
    """Narrows the whole base step by step down to the budget, each time the unit that costs the least loss per MAC.

    Where the budget is one of time, the least loss per nanosecond counts.

    Later rounds take the best trial so far, narrow a unit where that costs little loss, and widen one where that gains
    much. The loss rise of every unit alone is measured before the first round.
    """

    name = "greedy"
    measures = True

    def propose(self, task: Task, count: int) -> list[Proposal]:
        """Return `count` narrowed bases in the first round, and exchanges in later ones."""
        best = task.best()
        plain = [Proposal(_descend(task, dict.fromkeys(task.loss_rise(), 1.0)), f"least loss per {_one(task)} saved")]
        if best is None:
            return distinct(task, plain if task.round == 0 else [], _varied(task), count)
        return distinct(task, [], _exchanges(task, best), count)


def _one(task: Task) -> str:
    return {"MACs": "MAC"}.get(task.costs.measure, task.costs.measure)


def _descend(task: Task, factors: Mapping[str, float]) -> dict[str, int]:
    rise = task.loss_rise()
    widths = {unit.name: unit.channels for unit in task.units}
    cost = task.costs.total(widths)
    while cost > task.budget:
        choices = []
        for unit in task.units:
            now = widths[unit.name]
            narrower_ones = (width for width in task.costs.paying(unit) if width < now)
            for narrower in narrower_ones:  # several steps too: the loss need not be convex
                saved = task.costs.tables[unit.name][now] - task.costs.tables[unit.name][narrower]
                lost = (rise[unit.name][narrower] - rise[unit.name][now]) * factors[unit.name]
                if saved > 0:
                    choices.append((lost / saved, unit.name, narrower, saved))
        _, name, widths[name], saved = min(choices)
        cost -= saved
    return widths


def _varied(task: Task) -> Iterator[Proposal]:
    rng = task.rng()
    while True:
        factors = np.exp(SPREAD * rng.standard_normal(len(task.units)))
        named = {unit.name: float(factor) for unit, factor in zip(task.units, factors, strict=True)}
        yield Proposal(_descend(task, named), f"least loss per {_one(task)} saved, with randomly weighted units")


def _exchanges(task: Task, best: Trial) -> Iterator[Proposal]:
    """The best trial with one unit wider and another narrower, likely pairs first."""
    rng, rise = task.rng(), task.loss_rise()
    names = [unit.name for unit in task.units]
    steps = {unit.name: unit.step for unit in task.units}
    full = {unit.name: unit.channels for unit in task.units}
    scale = {unit.name: max(task.costs.tables[unit.name][unit.channels], 1) / unit.channels for unit in task.units}

    def slope(name: str, direction: int) -> float | None:
        now = best.widths[name]
        then = now + direction * steps[name]
        return (rise[name][then] - rise[name][now]) / (steps[name] * scale[name]) if 0 <= then <= full[name] else None

    gains = {name: -value for name in names if (value := slope(name, 1)) is not None}
    losses = {name: value for name in names if (value := slope(name, -1)) is not None}
    by_gain, by_loss = sorted(gains, key=lambda n: -gains[n]), sorted(losses, key=lambda n: losses[n])
    while True:
        if not by_gain or not by_loss:
            yield Proposal(dict(best.widths), "nothing to exchange")
            continue
        wider = by_gain[min(int(rng.geometric(0.3)), len(by_gain)) - 1]
        narrower = by_loss[min(int(rng.geometric(0.3)), len(by_loss)) - 1]
        widths = dict(best.widths)
        widths[wider] = min(widths[wider] + steps[wider] * int(rng.integers(1, 3)), full[wider])
        if narrower != wider:
            widths[narrower] = max(widths[narrower] - steps[narrower] * int(rng.integers(1, 3)), 0)
        yield Proposal(widths, f"{best.round}.{best.candidate} with {wider} wider and {narrower} narrower")
