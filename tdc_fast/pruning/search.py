"""From a trained base to one width plan: budgets, importance, widths, and rounds of proposing and scoring.

Source: arXiv 2312.13307 (Proxy-based Pruning). Each round a proposer answers with widths, which are moved onto the
group's budget and, when there is a scorer, scored; the memory of the rounds goes back to the proposer, and the best
scored widths win. By default there is one round, its proposer is the exact solve for kept importance, and nothing
needs scoring.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from tdc_fast.errors import invalid
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan, base_hash
from tdc_fast.pruning.agents import MostImportant, Proposer, Scorer, Task, Trial, Widths
from tdc_fast.pruning.budget import budget_macs, group_fractions
from tdc_fast.pruning.importance import (
    Batch,
    Importance,
    balanced,
    magnitude_importance,
    split_batch,
    taylor_importance,
)
from tdc_fast.pruning.macs import MacCounter, UnitCosts, measure_macs, one_sample_on_meta, unit_costs
from tdc_fast.pruning.solver import Solution, UnitTable, lowest_macs, solve

IMPORTANCES = ("taylor", "magnitude")


@dataclass(frozen=True)
class Pruning:
    """A width plan and how it came about.

    calibration_macs : MACs spent on finding it (the forward and backward passes of the importance, and those of the
        scorer), measured; they belong to the total cost of the training.
    base_macs        : MACs per sample of the whole base.
    fractions        : the share of it that each group was allowed.
    trials           : per group the memory of its rounds; empty for a group that keeps the base.
    """

    plan: WidthPlan
    calibration_macs: int
    base_macs: int
    fractions: tuple[float, ...]
    trials: tuple[tuple[Trial, ...], ...]


def prune(base: nn.Module, groups: Any, diffusion: Any, batches: Iterable[Batch], **settings: Any) -> WidthPlan:
    """The width plan alone of `plan_pruning`, which takes the same arguments."""
    return plan_pruning(base, groups, diffusion, batches, **settings).plan


def plan_pruning(
    base: Any,
    groups: Any,
    diffusion: Any,
    batches: Iterable[Batch],
    *,
    k: float | Sequence[float],
    importance: str | Callable[[int], Importance] = "taylor",
    difficulty: str | Sequence[float] = "snr",
    tolerance: float = 0.01,
    max_batches: int = 8,
    proposer: Proposer | None = None,
    scorer: Scorer | None = None,
    rounds: int = 1,
    strict: bool = False,
    seed: int = 0,
) -> Pruning:
    """Choose how wide every unit of every group's expert is, within `tolerance` below the group's budget.

    base        : the trained denoiser; offers `pruning_units()` and `with_widths(widths)`. It is not changed.
    groups      : TimestepGroups of the timesteps of `diffusion`.
    diffusion   : offers `num_timesteps`, `snr_db()` (T,) and `training_losses`.
    batches     : calibration data, x0 (B, ...) or (x0, model_kwargs); `max_batches` of them are read, once.
    k           : 0 < k <= 1 of the budget law, or one share of the base's MACs for each group.
    importance  : 'taylor' (on the group's own timesteps, in units of loss across all units), 'magnitude' (of the
                  weights, `balanced` by the units' MACs), or a function from the group's index to {unit: (atoms,)}.
    difficulty  : 'snr', 'snr-reversed', or one number per group, e.g. losses (see `difficulty_order`).
    proposer, scorer, rounds : the search within each group; more than one round needs a scorer.
    strict      : raise instead of warn where the units are too coarse to land within the tolerance.

    MACs are FlopCounterMode's, per sample, of the pruned model itself. A group whose budget is the whole base keeps it
    as it is. The result depends on the arguments (with the proposer and the scorer) alone.

    Raises ValueError for arguments out of range, and for a budget below the smallest that the units reach.
    """
    if isinstance(importance, str) and importance not in IMPORTANCES:
        raise invalid("importance", importance, f"one of {IMPORTANCES}, or a function of the group's index")
    if rounds < 1 or (rounds > 1 and scorer is None):
        raise invalid("rounds", rounds, "at least 1, and a scorer for more than 1")
    if max_batches < 1:
        raise invalid("max_batches", max_batches, "at least 1")
    if diffusion.num_timesteps != groups.num_timesteps:
        raise invalid("groups", groups, f"groups of the diffusion's {diffusion.num_timesteps} timesteps")
    fractions = group_fractions(groups, diffusion.snr_db(), k, difficulty)
    data = list(islice(batches, max_batches))
    if not data:
        raise invalid("batches", data, "at least one batch of calibration data")
    units = tuple(base.pruning_units())
    costs = unit_costs(base, *split_batch(data[0]))
    budgets = tuple(budget_macs(fraction, costs.full()) for fraction in fractions)
    _check_reachable(k, budgets, costs)

    def importance_of(group: int, interval: tuple[int, int]) -> Importance:
        if callable(importance):
            return importance(group)
        if importance == "magnitude":
            whole = {unit.name: float(costs.tables[unit.name][unit.channels]) for unit in units}
            return balanced(magnitude_importance(base, units), whole)
        return taylor_importance(base, units, data, diffusion, interval, seed=seed)

    experts: list[dict[str, ExpertUnit]] = []
    macs: list[int] = []
    memories: list[tuple[Trial, ...]] = []
    calibration = 0
    for group, (interval, budget) in enumerate(zip(groups, budgets, strict=True)):
        if budget >= costs.full():
            experts.append({u.name: ExpertUnit(tuple(range(u.num_atoms)), u.channels) for u in units})
            macs.append(costs.full())
            memories.append(())
            continue
        with MacCounter() as counter:
            scores = importance_of(group, interval)
            task = Task(group, interval, units, costs, budget, tolerance, scores)
            best = search_widths(task, proposer or MostImportant(), scorer, rounds)
        calibration += counter.macs
        _report_coarse_units(task, best, strict)
        experts.append({u.name: ExpertUnit(task.order(u.name), best.widths[u.name]) for u in units})
        macs.append(_measured(base, best, data[0]))
        memories.append(tuple(task.memory))
    plan = WidthPlan(
        base_hash=base_hash(base),
        boundaries=groups.boundaries,
        experts=tuple(experts),
        macs=tuple(macs),
        budgets=budgets,
    )
    return Pruning(plan, calibration, costs.full(), fractions, tuple(memories))


def search_widths(task: Task, proposer: Proposer, scorer: Scorer | None = None, rounds: int = 1) -> Trial:
    """Rounds of proposing, moving onto the budget and scoring; the trial of lowest score, the first of equals.

    Every trial goes into `task.memory`. A candidate that was scored before is not scored again.
    """
    known: dict[tuple[int, ...], float] = {}
    for _ in range(rounds):
        solution = project(task, proposer.propose(task))
        score = None
        if scorer is not None:
            key = tuple(solution.widths[unit.name] for unit in task.units)
            if key not in known:
                known[key] = float(scorer.score(task, [solution.widths])[0])
            score = known[key]
        task.memory.append(Trial(solution.widths, solution.macs, score))
    return min(task.memory, key=lambda trial: trial.score or 0.0)


def project(task: Task, proposal: Widths, weights: Mapping[str, float] | None = None) -> Solution:
    """The allowed widths nearest to a proposal whose MACs lie within the tolerance below the task's budget.

    Distance is the sum over units of weight * |width - proposed| / channels, every weight 1 unless given. A proposal
    that is allowed and within the budget's window comes back as it is. ValueError for a unit that is missing, unknown,
    or proposed outside [0, channels].
    """
    names = {unit.name for unit in task.units}
    if set(proposal) != names:
        odd = sorted(names.symmetric_difference(proposal))
        raise invalid("proposal", odd, "one width for each unit of the task, and no others")
    tables = []
    for unit in task.units:
        wanted, weight = proposal[unit.name], 1.0 if weights is None else weights.get(unit.name, 1.0)
        if not 0 <= wanted <= unit.channels:
            raise invalid(f"proposal[{unit.name!r}]", wanted, f"a width from 0 to {unit.channels}")
        widths = unit.widths()
        macs = tuple(task.costs.tables[unit.name][width] for width in widths)
        nearness = tuple(-weight * abs(width - wanted) / unit.channels for width in widths)
        tables.append(UnitTable(unit.name, widths, macs, nearness))
    return solve(tables, task.budget, fixed_macs=task.costs.fixed, tolerance=task.tolerance)


def _check_reachable(k: object, budgets: Sequence[int], costs: UnitCosts) -> None:
    for group, budget in enumerate(budgets):
        if budget < costs.least():
            share = costs.least() / costs.full()
            raise invalid(
                "k",
                k,
                f"a larger one: group {group} is allowed {budget} MACs, and the smallest reachable budget is "
                f"{costs.least()} ({share:.4f} of the base)",
            )


def _report_coarse_units(task: Task, best: Trial, strict: bool) -> None:
    """Raise or warn when the chosen widths miss the window below the budget."""
    outcome = Solution(best.widths, best.macs, 0.0, task.budget, lowest_macs(task.budget, task.tolerance))
    if outcome.reached:
        return
    message = f"group {task.group}: {outcome.statement()}"
    if strict:
        raise invalid("k", f"a budget of {task.budget} MACs", f"one that the units can meet ({message})")
    warnings.warn(message, stacklevel=3)


def _measured(base: Any, best: Trial, batch: Batch) -> int:
    """MACs per sample of the pruned model itself, which must be what the units' costs add up to."""
    x, t, kwargs = one_sample_on_meta(*split_batch(batch))
    macs = measure_macs(base.with_widths(best.widths).to("meta"), x, t, **kwargs)
    if macs != best.macs:
        raise invalid("base", f"{macs} MACs after pruning", f"{best.macs}, the sum of its units' costs")
    return macs
