"""What a pruning agent is given and gives back: one group's task, proposals, and the trials that became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning.importance import Importance
from tdc_fast.pruning.projection import project
from tdc_fast.pruning.solver import Solution, UnitTable, solve
from tdc_fast.pruning.unit_costs import UnitCosts

Widths = Mapping[str, int]  # unit name -> channels
LossRise = Mapping[str, Mapping[int, float]]  # unit name -> {width: how much the loss rises when it alone is so narrow}


@dataclass(frozen=True)
class Proposal:
    """Widths that an agent wants to have tried, and why; the reason is kept in the memory for people."""

    widths: dict[str, int]
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    """Proposals with what went into them: notes for people, and calls to a service."""

    proposals: tuple[Proposal, ...]
    notes: tuple[str, ...] = ()
    calls: int = 0


@dataclass(frozen=True)
class Trial:
    """One entry of the memory: what was proposed, the widths it became on the budget, and how they did.

    score : the candidate's loss, lower is better; None where nothing was scored.
    spent : MACs that scoring it took; 0 for widths whose score was known already.
    agent : who proposed it. seed : the seed of the round's draws.
    """

    widths: dict[str, int]
    macs: int
    score: float | None
    proposal: dict[str, int]
    group: int = 0
    round: int = 0
    candidate: int = 0
    agent: str = ""
    seed: int = 0
    reason: str = ""
    spent: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """Group, round and candidate, which no other trial of a search has."""
        return self.group, self.round, self.candidate

    @property
    def moved(self) -> dict[str, tuple[int, int]]:
        """What the projection onto the budget changed: {unit: (proposed, tried)}."""
        return {u: (self.proposal[u], width) for u, width in self.widths.items() if self.proposal[u] != width}


@dataclass(frozen=True)
class Task:
    """What one group's expert must meet, and what is known about it, at the start of a round.

    group      : index of the group; `interval` its timesteps (start, stop).
    units      : what can be narrowed, each with its allowed widths.
    costs      : measured MACs per sample, a constant plus one table per unit.
    budget     : MACs per sample allowed; `tolerance` the share below it that still counts as met.
    importance : {unit name: (atoms,)} on this group's timesteps; `order` the atoms, most important first.
    memory     : this group's trials so far, oldest first; `earlier` those of the groups searched before it. Both are
                 empty when the search is told to do without memory.
    measured   : the loss rise of each unit alone, for agents that ask for it (`loss_rise` is there for all).
    round      : which round this is, from 0; `seed` decides whatever is drawn in it.
    calls      : calls to a service that the search's agents have made so far, for those with a budget of them.
    """

    group: int
    interval: tuple[int, int]
    units: tuple[PruningUnit, ...]
    costs: UnitCosts
    budget: int
    tolerance: float
    importance: Importance
    memory: tuple[Trial, ...] = ()
    earlier: tuple[Trial, ...] = ()
    measured: LossRise | None = None
    round: int = 0
    seed: int = 0
    calls: int = 0

    def order(self, unit: str) -> tuple[int, ...]:
        """The unit's atoms, most important first; ties in their original order."""
        return tuple(int(atom) for atom in np.argsort(-self.importance[unit], kind="stable"))

    def rng(self) -> np.random.Generator:
        """Fresh random numbers of this round: equal tasks draw equal numbers."""
        return np.random.default_rng([self.seed, self.group, self.round])

    def project(self, widths: Widths, weights: Mapping[str, float] | None = None) -> Solution:
        """The allowed widths nearest to these that meet the budget: what the search will make of a proposal."""
        return project(self.units, self.costs, self.budget, self.tolerance, widths, weights)

    def most_important(self, factors: Mapping[str, float] | None = None) -> Solution:
        """The widths that keep most importance within the budget: an exact solve.

        `factors` multiply the units' importance, which makes some of them wider at the expense of the others.
        """
        tables = importance_tables(self, factors)
        return solve(tables, self.budget, fixed_macs=self.costs.fixed, tolerance=self.tolerance)

    def loss_rise(self) -> LossRise:
        """How much the loss rises when one unit alone is narrowed: measured, else the importance that goes with it."""
        if self.measured is not None:
            return self.measured
        rise: dict[str, dict[int, float]] = {}
        for unit in self.units:
            lost = np.concatenate([[0.0], np.cumsum(np.sort(self.importance[unit.name]))])
            rise[unit.name] = {width: float(lost[(unit.channels - width) // unit.atom]) for width in unit.widths()}
        return rise

    def best(self) -> Trial | None:
        """The trial of this group with the lowest score, the first of equals; None before anything was scored."""
        return best_of(self.memory)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial of lowest score, the first of equals; None where none was scored."""
    scored = [trial for trial in trials if trial.score is not None]
    return min(scored, key=lambda trial: trial.score or 0.0, default=None)


def importance_tables(task: Task, factors: Mapping[str, float] | None = None) -> list[UnitTable]:
    """The solver's tables: value of a width = importance of the atoms it keeps, times the unit's factor.

    Scores count as they are across units: Taylor importance has one unit, loss, everywhere. A millionth of the total,
    in proportion to the width, is added, so that among equally important choices the wider wins.
    """
    total = sum(float(scores.sum()) for scores in task.importance.values()) or 1.0
    tables = []
    for unit in task.units:
        factor = 1.0 if factors is None else factors[unit.name]
        kept = factor * np.concatenate([[0.0], np.cumsum(np.sort(task.importance[unit.name])[::-1])])
        widths = unit.widths()
        values = [float(kept[w // unit.atom]) + 1e-6 * total * w / unit.channels for w in widths]
        macs = tuple(task.costs.tables[unit.name][w] for w in widths)
        tables.append(UnitTable(unit.name, widths, macs, tuple(values)))
    return tables


def as_key(units: Sequence[PruningUnit], widths: Mapping[str, Any]) -> tuple[int, ...]:
    """Widths in the order of the units: equal for equal candidates."""
    return tuple(widths[unit.name] for unit in units)
