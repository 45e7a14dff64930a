"""What a pruning agent gets and returns: one group's task, proposals, and the trials made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.importance import Importance
from tdc_fast.pruning.projection import project
from tdc_fast.pruning.solver import Solution, UnitTable, solve

Widths = Mapping[str, int]  # unit name -> channels
LossRise = Mapping[str, Mapping[int, float]]  # unit name -> {width: rise of the loss with this unit alone narrowed}


@dataclass(frozen=True)
class Proposal:
    """Widths that an agent proposes.

    Attributes:
        widths: {unit: channels}.
        reason: why, in words; the memory keeps it for the reader.
    """

    widths: dict[str, int]
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    """Proposals with facts about how they were made.

    Attributes:
        proposals: the proposed widths.
        notes: for the reader of the memory.
        calls: calls to a service that were made.
    """

    proposals: tuple[Proposal, ...]
    notes: tuple[str, ...] = ()
    calls: int = 0


@dataclass(frozen=True)
class Trial:
    """One entry of the memory: a proposal, the widths that it became on the budget, and their score.

    Attributes:
        widths: the widths that were tried, {unit: channels}.
        macs: their MACs per sample.
        score: their loss, lower is better; None where nothing was scored.
        proposal: the widths that were proposed.
        group: index of the group.
        round: the round, from 0.
        candidate: number of the candidate within the round.
        agent: name of the agent that proposed it.
        seed: seed of the round's draws.
        reason: the agent's reason.
        spent: MACs that scoring took; 0 for widths whose score was known already.
        latency: their estimated time in nanoseconds (`UnitCosts`); None where the budget is in MACs.
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
    latency: int | None = None

    @property
    def cost(self) -> int:
        """What the budget counts: the time, or the MACs."""
        return self.macs if self.latency is None else self.latency

    @property
    def place(self) -> tuple[int, int, int]:
        """(group, round, candidate), which identifies a trial within its search."""
        return self.group, self.round, self.candidate

    @property
    def moved(self) -> dict[str, tuple[int, int]]:
        """The widths that the projection onto the budget changed, {unit: (proposed, tried)}."""
        return {u: (self.proposal[u], width) for u, width in self.widths.items() if self.proposal[u] != width}


@dataclass(frozen=True)
class Task:
    """One group's budget, and what is known about its expert, at the start of a round.

    Attributes:
        group: index of the group.
        interval: its timesteps (start, stop).
        units: the pruning units, each with its allowed widths.
        costs: what the budget counts, a constant plus one table per unit: measured MACs, or estimated time.
        budget: the cost allowed.
        tolerance: share of the budget that may stay unused.
        importance: {unit name: (atoms,)} on this group's timesteps.
        memory: this group's trials so far, oldest first. Empty if the search runs without memory.
        earlier: the trials of the groups searched before. Empty if the search runs without memory.
        measured: the measured loss rise of each unit alone, for agents with `measures`; see `loss_rise`.
        round: the round, from 0.
        seed: seed of the round's draws.
        calls: calls to a service that the search's agents have made so far.
        macs: measured MACs per sample, where `costs` are time.
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
    macs: UnitCosts | None = None

    def macs_of(self, widths: Widths) -> int:
        """MACs per sample of these widths."""
        return (self.macs or self.costs).total(widths)

    def order(self, unit: str) -> tuple[int, ...]:
        """The unit's atoms, most important first; ties in their original order."""
        return tuple(int(atom) for atom in np.argsort(-self.importance[unit], kind="stable"))

    def rng(self) -> np.random.Generator:
        """A new generator for this round: equal tasks draw equal numbers."""
        return np.random.default_rng([self.seed, self.group, self.round])

    def project(self, widths: Widths, weights: Mapping[str, float] | None = None) -> Solution:
        """The allowed widths nearest to these that meet the budget, which is what the search makes of a proposal.

        Args:
            widths: {unit: channels}.
            weights: {unit: weight in the distance}; 1 where it is not given.
        """
        return project(self.units, self.costs, self.budget, self.tolerance, widths, weights)

    def most_important(self, factors: Mapping[str, float] | None = None) -> Solution:
        """The widths that keep the most importance within the budget, solved exactly.

        Args:
            factors: {unit: factor on its importance}, to make some units wider at the expense of others.
        """
        tables = importance_tables(self, factors)
        return solve(tables, self.budget, fixed=self.costs.fixed, tolerance=self.tolerance, measure=self.costs.measure)

    def loss_rise(self) -> LossRise:
        """The rise of the loss with one unit alone narrowed: measured, else estimated by the importance it loses."""
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
    """The solver's tables: the value of a width is the importance of the atoms it keeps, times the unit's factor.

    Scores of different units are compared as they are, since Taylor importance is in units of loss everywhere. A
    millionth of the total, in proportion to the width, is added, so that of equally important choices the wider wins.

    Args:
        task: the group's task.
        factors: {unit: factor on its importance}; None for 1.
    """
    total = sum(float(scores.sum()) for scores in task.importance.values()) or 1.0
    tables = []
    for unit in task.units:
        factor = 1.0 if factors is None else factors[unit.name]
        kept = factor * np.concatenate([[0.0], np.cumsum(np.sort(task.importance[unit.name])[::-1])])
        widths = task.costs.paying(unit)
        values = [float(kept[w // unit.atom]) + 1e-6 * total * w / unit.channels for w in widths]
        costs = tuple(task.costs.tables[unit.name][w] for w in widths)
        tables.append(UnitTable(unit.name, widths, costs, tuple(values)))
    return tables


def as_key(units: Sequence[PruningUnit], widths: Mapping[str, Any]) -> tuple[int, ...]:
    """The widths as a tuple in the order of the units; equal for equal candidates."""
    return tuple(widths[unit.name] for unit in units)
