"""From a trained base to one width plan: budgets, importance, and a search in every group that must be pruned.

Source: arXiv 2312.13307 (Proxy-based Pruning). In each round an agent proposes candidates; they are moved onto the
group's budget and scored together; the memory of the rounds goes back to the agent; the best scored widths win. By
default there is one round, its agent is the exact solve for kept importance, and nothing is scored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdc_fast.diffusion.calibration import Batch, split_batch
from tdc_fast.diffusion.protocols import DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.nn.sharing import Rows, shared_rows, unit_rows
from tdc_fast.nn.units import Prunable, PruningUnit, module_of, units_of, with_widths
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan, base_hash
from tdc_fast.pruning.agents import Agent, resolved_agent
from tdc_fast.pruning.budget import budget_of, group_fractions
from tdc_fast.pruning.costs import UnitCosts, one_sample_on_meta, unit_costs
from tdc_fast.pruning.helpers import Helpers
from tdc_fast.pruning.importance import Importance, TaylorImportance, balanced, magnitude_importance
from tdc_fast.pruning.latency.costs import stepped, unit_latencies
from tdc_fast.pruning.memory import Memory
from tdc_fast.pruning.progress import Progress
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.scoring import DenoisingLoss, Scorer
from tdc_fast.pruning.settings import PruningSettings
from tdc_fast.pruning.solver import Solution, lowest_cost
from tdc_fast.pruning.task import Task, Trial
from tdc_fast.routing import TimestepGroups


@dataclass(frozen=True)
class Pruning:
    """A width plan and how it was found.

    Attributes:
        plan: the widths of every group's expert.
        calibration_macs: measured MACs spent on finding it (forward and backward passes for the importance, forward
            passes for the scores); they belong to the total cost of the training.
        base_macs: MACs per sample of the whole base.
        fractions: the share of its MACs, or of its time, that each group was allowed.
        trials: per group what was tried; empty for a group that keeps the base.
        base_latency: estimated time of the whole base in nanoseconds (`UnitCosts`); None where none is estimated.
    """

    plan: WidthPlan
    calibration_macs: int
    base_macs: int
    fractions: tuple[float, ...]
    trials: tuple[tuple[Trial, ...], ...]
    base_latency: int | None = None


def prune(
    base: nn.Module | Prunable,
    groups: TimestepGroups,
    diffusion: DiffusionProcess,
    batches: Iterable[Batch],
    **arguments: Any,
) -> WidthPlan:
    """The width plan alone of `plan_pruning`, which takes the same arguments."""
    return plan_pruning(base, groups, diffusion, batches, **arguments).plan


def plan_pruning(
    base: nn.Module | Prunable,
    groups: TimestepGroups,
    diffusion: DiffusionProcess,
    batches: Iterable[Batch],
    settings: PruningSettings | None = None,
    *,
    agent: str | Agent = "auto",
    scorer: Scorer | None = None,
    memory_file: str | Path | None = None,
    stand_in: Agent | None = None,
    progress: Progress | None = None,
    helpers: Helpers | None = None,
    **options: Any,
) -> Pruning:
    """Choose how wide every unit of every group's expert is, just below the group's budget.

    Groups are searched in their order, each seeing what the earlier ones found. MACs are FlopCounterMode's, per sample,
    of the pruned model itself; with `budget_in="latency"` budgets are estimated time instead. A group whose budget is
    the whole base keeps it as it is. The result depends on the arguments (with the agent and the scorer) alone.

    Args:
        base: the trained denoiser. It is not changed.
        groups: groups of the timesteps of `diffusion`.
        diffusion: the process that the base was trained with.
        batches: calibration data, x0 (B, ...) or (x0, model_kwargs); `max_batches` of them are read, once.
        settings: the settings of the search; None takes them from `options`.
        agent: who proposes widths: a name of `tdc_fast.pruning.AGENTS` or an object with the protocol. "auto" is the
            exact solve for kept importance when there is one round, and "tpe" for more.
        scorer: None scores by the denoising loss on the same calibration data, and not at all for an agent of a single
            proposal.
        memory_file: JSON lines of everything that was tried (`Memory`). If it exists,
            that search is resumed.
        stand_in: agent for the rounds in which `agent` fails; without one a failure ends the search.
        progress: receives the events of the search.
        helpers: other processes that measure importance and scores; the result does not depend on them.
        **options: fields of `PruningSettings` such as `k=0.6, rounds=4`.

    Raises:
        ValueError: an argument is out of range, a budget is below the smallest that the units reach, or the memory is
            of another search.
    """
    settings = PruningSettings(**options) if settings is None else dataclasses.replace(settings, **options)
    module = module_of(base)
    if diffusion.num_timesteps != groups.num_timesteps:
        raise invalid("groups", groups, f"groups of the diffusion's {diffusion.num_timesteps} timesteps")
    agent = resolved_agent(agent, settings.rounds, settings.importance)
    if agent.name == "magnitude":
        settings = dataclasses.replace(settings, importance="magnitude")
    fractions = group_fractions(groups, diffusion.snr_db(), settings.k, settings.difficulty)
    data = list(islice(batches, settings.max_batches))
    if not data:
        raise invalid("batches", data, "at least one batch of calibration data")
    sample, units = split_batch(data[0]), tuple(units_of(base))
    macs = unit_costs(base, *sample)
    latency = None if settings.latency is None else unit_latencies(base, *sample, settings.latency)
    if settings.width_step != 1:
        units = stepped(base, units, *sample, settings.width_step)
        macs, latency = macs.at_widths_of(units), None if latency is None else latency.at_widths_of(units)
    costs = macs if settings.budget_in == "macs" or latency is None else latency
    budgets = tuple(budget_of(fraction, costs.full()) for fraction in fractions)
    named = {f"group {group}": budget for group, budget in enumerate(budgets)}
    check_reachable(settings.k, named, costs.least(), costs.full(), settings.k_name, costs.measure)
    if scorer is None and not getattr(agent, "one_shot", False):
        scorer = DenoisingLoss(
            base, diffusion, data, seed=settings.seed, max_samples=settings.max_samples, dtype=settings.dtype
        )
    if helpers is not None and scorer is not None:
        scorer = helpers.sharing(scorer)
    search = _Search(
        base=base,
        digest=base_hash(module),
        units=units,
        ordered_alike=unit_rows(units, shared_rows(module, settings.shared_layers, groups.num_groups)),
        groups=groups,
        diffusion=diffusion,
        data=data,
        settings=settings,
        agent=agent,
        stand_in=stand_in,
        scorer=scorer,
        progress=progress,
        helpers=helpers,
        macs=macs,
        latency=latency,
        costs=costs,
        budgets=budgets,
    )
    with Memory(None if memory_file is None else Path(memory_file), search.identity()) as memory:
        return search.run(fractions, memory)


@dataclass(frozen=True)
class _Expert:
    """The result of one group's search."""

    units: dict[str, ExpertUnit]
    macs: int
    latency: int | None = None
    calibration_macs: int = 0


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One search over all groups, its arguments checked."""

    base: nn.Module | Prunable
    digest: str
    units: tuple[PruningUnit, ...]
    ordered_alike: dict[str, Rows]
    groups: TimestepGroups
    diffusion: DiffusionProcess
    data: list[Batch]
    settings: PruningSettings
    agent: Agent
    stand_in: Agent | None
    scorer: Scorer | None
    progress: Progress | None
    helpers: Helpers | None
    macs: UnitCosts
    latency: UnitCosts | None
    costs: UnitCosts  # one of these two: what budgets count
    budgets: tuple[int, ...]

    def identity(self) -> dict[str, Any]:
        """JSON values that identify the search; a memory of another one is refused."""
        settings, alike = self.settings, self.ordered_alike
        return {
            "base_hash": self.digest,
            "boundaries": list(self.groups.boundaries),
            "budgets": list(self.budgets),
            "tolerance": settings.tolerance,
            "agent": self.agent.name,
            "importance": settings.importance if isinstance(settings.importance, str) else "given",
            "candidates": settings.candidates,
            "use_memory": settings.use_memory,
            "seed": settings.seed,
            "scored_samples": 0 if self.scorer is None else self.scorer.samples,
            **({} if settings.dtype == torch.float32 else {"dtype": str(settings.dtype)}),
            **({"ordered_alike": {name: list(rows) for name, rows in alike.items()}} if alike else {}),
            **({} if self.costs.measure == "MACs" else {"budget_in": "latency", "costs_hash": _hash(self.costs)}),
            **({} if settings.width_step == 1 else {"widths": [list(unit.widths()) for unit in self.units]}),
        }

    def run(self, fractions: tuple[float, ...], memory: Memory) -> Pruning:
        """Search every group in turn."""
        experts: list[_Expert] = []
        ahead = self._measure_together() if self.helpers is not None and self.settings.importance == "taylor" else 0
        for group, budget in enumerate(self.budgets):
            experts.append(self._whole() if budget >= self.costs.full() else self._pruned(group, memory))
        times = tuple(expert.latency for expert in experts if expert.latency is not None)
        in_macs = self.costs is self.macs
        plan = WidthPlan(
            base_hash=self.digest,
            boundaries=self.groups.boundaries,
            experts=tuple(expert.units for expert in experts),
            macs=tuple(expert.macs for expert in experts),
            budgets=self.budgets if in_macs else (),
            latency=times,
            latency_budgets=() if in_macs else self.budgets,
        )
        calibration = ahead + sum(expert.calibration_macs for expert in experts) + memory.spent
        trials = tuple(memory.of_group(group) for group in range(len(self.budgets)))
        base_latency = None if self.latency is None else self.latency.full()
        return Pruning(plan, calibration, self.macs.full(), fractions, trials, base_latency)

    def _measure_together(self) -> int:
        """Have the importance of every group that is pruned measured by all helpers; the MACs that it took."""
        assert self.helpers is not None
        groups = [group for group, budget in enumerate(self.budgets) if budget < self.costs.full()]
        measured, macs = self.helpers.importances([self._interval(group) for group in groups])
        self._importances.update(zip(groups, measured, strict=True))
        return macs

    def _interval(self, group: int) -> tuple[int, int]:
        return self.groups.boundaries[group], self.groups.boundaries[group + 1]

    def _whole(self) -> _Expert:
        units = {unit.name: ExpertUnit(tuple(range(unit.num_atoms)), unit.channels) for unit in self.units}
        return _Expert(units, self.macs.full(), None if self.latency is None else self.latency.full())

    def _pruned(self, group: int, memory: Memory) -> _Expert:
        settings = self.settings
        interval = self._interval(group)
        with MacCounter() as counter:
            importance = self._importance_of_sharers(group)
        budget, tolerance, seed = self.budgets[group], settings.tolerance, settings.seed
        task = Task(group, interval, self.units, self.costs, budget, tolerance, importance, seed=seed, macs=self.macs)
        best = search_widths(
            task,
            self.agent,
            self.scorer,
            rounds=settings.rounds,
            candidates=settings.candidates,
            memory=memory,
            use_memory=settings.use_memory,
            stand_in=self.stand_in,
            progress=self.progress,
        )
        _report_coarse_units(task, best, settings)
        units = {unit.name: ExpertUnit(task.order(unit.name), best.widths[unit.name]) for unit in self.units}
        time = None if self.latency is None else self.latency.total(best.widths)
        return _Expert(units, _measured(self.base, best, self.data[0]), time, counter.macs)

    @cached_property
    def _taylor(self) -> TaylorImportance:
        """One for all groups, which share its graphs."""
        return TaylorImportance(module_of(self.base), self.units, self.diffusion, self.settings.dtype)

    def _importance_of_sharers(self, group: int) -> Importance:
        """The group's importance; of a unit that pruned groups order alike, the mean of theirs."""
        importance = dict(self._importance(group))
        for unit, rows in self.ordered_alike.items():
            pruned = [other for other, budget in enumerate(self.budgets) if budget < self.costs.full()]
            alike = [other for other in pruned if rows[other] == rows[group]]
            importance[unit] = np.mean([self._importance(other)[unit] for other in alike], axis=0)
        return importance

    def _importance(self, group: int) -> Importance:
        if group not in self._importances:
            self._importances[group] = self._measured_importance(group)
        return self._importances[group]

    @cached_property
    def _importances(self) -> dict[int, Importance]:
        """Those that were measured, by group."""
        return {}

    def _measured_importance(self, group: int) -> Importance:
        given, base = self.settings.importance, module_of(self.base)
        if callable(given):
            return given(group)
        if given == "magnitude":
            whole = {unit.name: float(self.macs.tables[unit.name][unit.channels]) for unit in self.units}
            return balanced(magnitude_importance(base, self.units), whole)
        return self._taylor.of(self.data, self._interval(group), seed=self.settings.seed)


def check_reachable(
    k: object, budgets: Mapping[str, int], least: int, full: int, k_name: str = "k", measure: str = "MACs"
) -> None:
    """Refuse budgets that no choice of widths meets.

    Args:
        k: what the budgets came from.
        budgets: cost allowed to each group, by what errors call it.
        least: cost of the base with every unit at its cheapest width.
        full: cost of the whole base.
        k_name: what errors call `k`.
        measure: what costs count, "MACs" or "ns".

    Raises:
        ValueError: naming `k_name`, the group and the smallest share that can be reached.
    """
    for group, budget in budgets.items():
        if budget < least:
            raise invalid(
                k_name,
                k,
                f"a larger one: {group} is allowed {budget} {measure}, and the smallest reachable budget is "
                f"{least} ({least / full:.4f} of the base)",
            )


def _report_coarse_units(task: Task, best: Trial, settings: PruningSettings) -> None:
    """Raise or warn if the chosen widths miss the window below the budget."""
    floor = lowest_cost(task.budget, task.tolerance)
    outcome = Solution(best.widths, best.cost, 0.0, task.budget, floor, task.costs.measure)
    if outcome.reached:
        return
    message = f"group {task.group}: {outcome.statement()}"
    if settings.strict:
        raise invalid(
            settings.k_name,
            f"a budget of {task.budget} {task.costs.measure}",
            f"one that the units can meet ({message})",
        )
    warnings.warn(message, stacklevel=5)  # names the line that called plan_pruning


def _hash(costs: UnitCosts) -> str:
    return hashlib.sha256(json.dumps([costs.fixed, costs.tables]).encode()).hexdigest()


def _measured(base: nn.Module | Prunable, best: Trial, batch: Batch) -> int:
    """Measured MACs per sample of the pruned model itself, which must equal the sum of its units' costs."""
    x, t, kwargs = one_sample_on_meta(*split_batch(batch))
    macs = measure_macs(with_widths(base, best.widths).to("meta"), x, t, **kwargs)
    if macs != best.macs:
        raise invalid("base", f"{macs} MACs after pruning", f"{best.macs}, the sum of its units' costs")
    return macs
