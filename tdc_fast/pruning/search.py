"""From a trained base to one width plan: budgets, importance, and a search in every group that must be pruned.

Source: arXiv 2312.13307 (Proxy-based Pruning). In each round an agent proposes candidates; they are moved onto the
group's budget and scored together; the memory of the rounds goes back to the agent; the best scored widths win. By
default there is one round, its agent is the exact solve for kept importance, and nothing needs scoring.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from tdc_fast.diffusion.calibration import Batch, split_batch
from tdc_fast.errors import invalid
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan, base_hash
from tdc_fast.pruning.agents import AGENTS, Agent, make_agent
from tdc_fast.pruning.budget import budget_macs, group_fractions
from tdc_fast.pruning.importance import Importance, balanced, magnitude_importance, taylor_importance
from tdc_fast.pruning.macs import UnitCosts, one_sample_on_meta, unit_costs
from tdc_fast.pruning.memory import Memory
from tdc_fast.pruning.progress import Progress
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.scoring import DenoisingLoss, Scorer
from tdc_fast.pruning.solver import Solution, lowest_macs
from tdc_fast.pruning.task import Task, Trial

IMPORTANCES = ("taylor", "magnitude")


@dataclass(frozen=True)
class Pruning:
    """A width plan and how it came about.

    calibration_macs : MACs spent on finding it (the forward and backward passes of the importance, and those of the
        scorer), measured; they belong to the total cost of the training.
    base_macs        : MACs per sample of the whole base.
    fractions        : the share of it that each group was allowed.
    trials           : per group what was tried; empty for a group that keeps the base.
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
    agent: str | Agent = "auto",
    rounds: int = 1,
    candidates: int = 8,
    scorer: Scorer | None = None,
    max_samples: int = 1024,
    memory_file: str | Path | None = None,
    use_memory: bool = True,
    stand_in: Agent | None = None,
    progress: Progress | None = None,
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
                  It decides which atoms of a unit are kept first, whoever chooses the widths.
    difficulty  : 'snr', 'snr-reversed', or one number per group, e.g. losses (see `difficulty_order`).
    agent       : who proposes widths: a name of `agents.AGENTS` or any object with the protocol. 'auto' is the exact
                  solve for kept importance when there is one round, and 'tpe' for more.
    rounds, candidates, use_memory, stand_in, progress : see `search_widths`.
    scorer      : None scores by the denoising loss on the same calibration data, and not at all for an agent of a
                  single proposal; `max_samples` bounds a pass of it.
    memory_file : JSON lines of everything that was tried (`memory.Memory`); a search whose file is there goes on.
    strict      : raise instead of warn where the units are too coarse to land within the tolerance.

    Groups are searched in their order, each seeing what the earlier ones found. MACs are FlopCounterMode's, per sample,
    of the pruned model itself. A group whose budget is the whole base keeps it as it is. The result depends on the
    arguments (with the agent and the scorer) alone.

    Raises ValueError for arguments out of range, for a budget below the smallest that the units reach, and for a memory
    of another search.
    """
    if isinstance(importance, str) and importance not in IMPORTANCES:
        raise invalid("importance", importance, f"one of {IMPORTANCES}, or a function of the group's index")
    if max_batches < 1:
        raise invalid("max_batches", max_batches, "at least 1")
    if diffusion.num_timesteps != groups.num_timesteps:
        raise invalid("groups", groups, f"groups of the diffusion's {diffusion.num_timesteps} timesteps")
    chosen = resolved_agent(agent, rounds, importance)
    if chosen.name == "magnitude":
        importance = "magnitude"
    fractions = group_fractions(groups, diffusion.snr_db(), k, difficulty)
    data = list(islice(batches, max_batches))
    if not data:
        raise invalid("batches", data, "at least one batch of calibration data")
    units = tuple(base.pruning_units())
    costs = unit_costs(base, *split_batch(data[0]))
    budgets = tuple(budget_macs(fraction, costs.full()) for fraction in fractions)
    _check_reachable(k, budgets, costs)
    if scorer is None and not getattr(chosen, "one_shot", False):
        scorer = DenoisingLoss(base, diffusion, data, seed=seed, max_samples=max_samples)
    digest = base_hash(base)

    def importance_of(group: int, interval: tuple[int, int]) -> Importance:
        if callable(importance):
            return importance(group)
        if importance == "magnitude":
            whole = {unit.name: float(costs.tables[unit.name][unit.channels]) for unit in units}
            return balanced(magnitude_importance(base, units), whole)
        return taylor_importance(base, units, data, diffusion, interval, seed=seed)

    identity = {
        "base_hash": digest,
        "boundaries": list(groups.boundaries),
        "budgets": list(budgets),
        "tolerance": tolerance,
        "agent": chosen.name,
        "importance": importance if isinstance(importance, str) else "given",
        "candidates": candidates,
        "use_memory": use_memory,
        "seed": seed,
        "scored_samples": 0 if scorer is None else scorer.samples,
    }
    experts: list[dict[str, ExpertUnit]] = []
    macs: list[int] = []
    calibration = 0
    with Memory(None if memory_file is None else Path(memory_file), identity) as memory:
        for group, (interval, budget) in enumerate(zip(groups, budgets, strict=True)):
            if budget >= costs.full():
                experts.append({u.name: ExpertUnit(tuple(range(u.num_atoms)), u.channels) for u in units})
                macs.append(costs.full())
                continue
            with MacCounter() as counter:
                scores = importance_of(group, interval)
            calibration += counter.macs
            task = Task(group, interval, units, costs, budget, tolerance, scores, seed=seed)
            best = search_widths(
                task,
                chosen,
                scorer,
                rounds=rounds,
                candidates=candidates,
                memory=memory,
                use_memory=use_memory,
                stand_in=stand_in,
                progress=progress,
            )
            _report_coarse_units(task, best, strict)
            experts.append({u.name: ExpertUnit(task.order(u.name), best.widths[u.name]) for u in units})
            macs.append(_measured(base, best, data[0]))
        trials = tuple(memory.of_group(group) for group in range(len(budgets)))
        calibration += memory.spent
    plan = WidthPlan(
        base_hash=digest, boundaries=groups.boundaries, experts=tuple(experts), macs=tuple(macs), budgets=budgets
    )
    return Pruning(plan, calibration, costs.full(), fractions, trials)


def resolved_agent(agent: str | Agent, rounds: int, importance: object = "taylor") -> Agent:
    """The agent itself; 'auto' is the one-shot answer by the importance for one round, else 'tpe'."""
    if not isinstance(agent, str):
        if isinstance(agent, type) or not (hasattr(agent, "name") and callable(getattr(agent, "propose", None))):
            raise invalid("agent", agent, f"one of {', '.join(AGENTS)}, or an object with a name and a method propose")
        return agent
    if agent == "auto":
        agent = "tpe" if rounds > 1 else "magnitude" if importance == "magnitude" else "taylor"
    return make_agent(agent)


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
