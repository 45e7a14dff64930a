"""The seam of the pruning search: something that proposes widths, and something that scores them.

A proposer sees one group's task (units, measured costs, budget, importance) and the memory of what was tried, and
answers with a width per unit; it need not meet the budget, for `search.project` moves its answer there. A scorer
says how good candidates are, lower being better. Any object with the method will do: a rule, a search library, a
language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning.importance import Batch, Importance, calibration_losses
from tdc_fast.pruning.macs import UnitCosts
from tdc_fast.pruning.narrow import narrow
from tdc_fast.pruning.solver import UnitTable, solve

Widths = Mapping[str, int]  # unit name -> channels


@dataclass(frozen=True)
class Trial:
    """One entry of the memory: widths that were tried, their MACs per sample, their score (None if not scored)."""

    widths: dict[str, int]
    macs: int
    score: float | None


@dataclass(frozen=True)
class Task:
    """What one group's expert must meet, and what is known about it.

    group      : index of the group; `interval` its timesteps (start, stop).
    units      : what can be narrowed, each with its allowed widths.
    costs      : measured MACs per sample, a constant plus one table per unit.
    budget     : MACs per sample allowed; `tolerance` the share below it that still counts as met.
    importance : {unit name: (atoms,)} on this group's timesteps; `order` the atoms, most important first.
    memory     : the trials so far, oldest first.
    """

    group: int
    interval: tuple[int, int]
    units: tuple[PruningUnit, ...]
    costs: UnitCosts
    budget: int
    tolerance: float
    importance: Importance
    memory: list[Trial] = field(default_factory=list)

    def order(self, unit: str) -> tuple[int, ...]:
        """The unit's atoms, most important first; ties in their original order."""
        return tuple(int(atom) for atom in np.argsort(-self.importance[unit], kind="stable"))


class Proposer(Protocol):
    def propose(self, task: Task) -> Widths:
        """A width in channels for every unit of the task, in view of its memory."""


class Scorer(Protocol):
    def score(self, task: Task, candidates: Sequence[Widths]) -> Sequence[float]:
        """One number per candidate, lower is better; candidates come together so that they can share a launch."""


class MostImportant:
    """Proposes the widths that keep the most importance within the budget: exact, without looking at the memory."""

    def propose(self, task: Task) -> Widths:
        return solve(importance_tables(task), task.budget, fixed_macs=task.costs.fixed, tolerance=task.tolerance).widths


class DenoisingLoss:
    """Scores candidates by their denoising loss on calibration data at the group's timesteps, before fine-tuning.

    Every candidate sees the same data, timesteps and noise, which depend on `seed` alone.
    """

    def __init__(
        self, base: nn.Module, diffusion: Any, batches: Iterable[Batch], *, max_batches: int = 8, seed: int = 0
    ) -> None:
        self.base, self.diffusion, self.seed = base, diffusion, seed
        self.batches = list(islice(batches, max_batches))

    def score(self, task: Task, candidates: Sequence[Widths]) -> list[float]:
        orders = {unit.name: task.order(unit.name) for unit in task.units}
        return [self._loss(narrow(self.base, orders, widths), task.interval) for widths in candidates]

    @torch.no_grad()
    def _loss(self, model: nn.Module, interval: tuple[int, int]) -> float:
        batches = calibration_losses(model.eval(), self.batches, self.diffusion, interval, seed=self.seed)
        losses = [loss.double() for loss in batches]
        return float(torch.cat(losses).mean())


def importance_tables(task: Task) -> list[UnitTable]:
    """The solver's tables: value of a width = importance of the atoms it keeps.

    Scores count as they are across units: Taylor importance has one unit, loss, everywhere. A millionth of the total,
    in proportion to the width, is added, so that among equally important choices the wider wins.
    """
    total = sum(float(scores.sum()) for scores in task.importance.values()) or 1.0
    tables = []
    for unit in task.units:
        kept = np.concatenate([[0.0], np.cumsum(np.sort(task.importance[unit.name])[::-1])])
        widths = unit.widths()
        values = [float(kept[w // unit.atom]) + 1e-6 * total * w / unit.channels for w in widths]
        macs = tuple(task.costs.tables[unit.name][w] for w in widths)
        tables.append(UnitTable(unit.name, widths, macs, tuple(values)))
    return tables
