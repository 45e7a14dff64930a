"""Phase "pruning": the search for every expert's widths, within a run or alone (the command `tdc_fast.prune`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tdc_fast.data.dataset import Dataset
from tdc_fast.diffusion.calibration import Batch
from tdc_fast.distributed import world
from tdc_fast.errors import invalid
from tdc_fast.grouping import probe_losses
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.macs import MacCounter
from tdc_fast.nn.width_plan import WidthPlan, base_hash
from tdc_fast.pruning import Agent, Pruning, PruningSettings, make_agent, plan_pruning
from tdc_fast.pruning.agents import resolved_agent
from tdc_fast.pruning.budget import budget_law, budget_of
from tdc_fast.pruning.importance import Importance, TaylorImportance
from tdc_fast.pruning.memory import MEMORY_FILE, OtherSearch, set_aside
from tdc_fast.pruning.plots import draw_search
from tdc_fast.pruning.progress import BarAndTable
from tdc_fast.pruning.scoring import DenoisingLoss
from tdc_fast.pruning.search import check_reachable
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import (
    build_data,
    build_device,
    build_diffusion,
    calibration_dtype,
    refuse_what_cannot_fit,
)
from tdc_fast.runs.checkpoint import finished_steps
from tdc_fast.runs.config import TrainConfig, keep_decisions, refuse_changed_options
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.runs.opening import open_run
from tdc_fast.runs.options import SearchOptions
from tdc_fast.runs.processes import one_process
from tdc_fast.runs.widths import NEXT_PLAN, find_plan, finish_commit, plan_hash
from tdc_fast.training.base import train_base
from tdc_fast.training.cost import stage1_steps
from tdc_fast.training.grouping import group_timesteps
from tdc_fast.training.interrupts import saying_what_is_safe
from tdc_fast.training.latency import check_table, latency_model, outline_costs, width_step
from tdc_fast.training.messages import warn_of_few_calibration_images
from tdc_fast.training.parallel_search import ParallelSearch
from tdc_fast.training.phase import State, base_macs, build_base, groups_of, open_stream, write_phase
from tdc_fast.training.random_state import derived_seed, seeded


def prune_base(run: RunDirectory, base_state: State, dataset: Dataset | None = None) -> WidthPlan | None:
    """Choose every expert's widths within its budget and write widths.json.

    A plan that is in widths.json already is used, after a check that it is of this base.

    Args:
        run: the run.
        base_state: what `train_base` returned.
        dataset: images to calibrate on; None loads what the configuration names.

    Returns:
        The plan; None if every expert keeps the whole base.
    """
    base = build_base(run, base_state)
    plan = world().from_first(lambda: _found_plan(run, base))
    if plan is not None or not prunes(run.config):
        return plan
    return search_run(run, run.config, base, dataset).plan


def _found_plan(run: RunDirectory, base: UNet) -> WidthPlan | None:
    """The run's plan, if it has one; the end of the phase is written down where there is nothing to prune."""
    finish_commit(run)
    path = find_plan(run)
    if path is not None:
        plan = WidthPlan.load(path)
        plan.check(base.pruning_units(), base=base_hash(base), boundaries=groups_of(run).boundaries)
        return plan
    if not prunes(run.config):
        write_phase(run, base_macs(run, base), "pruning", macs=0)
    return None


@one_process
def prune_run(directory: str | Path, dataset: Dataset | None = None, **options: Any) -> Pruning:
    """Search the widths for a run with a finished stage 1 and write them where stage 2 finds them.

    A search of the same settings that was interrupted is resumed; a finished one is extended if more rounds are asked
    for.

    Args:
        directory: the run.
        dataset: images to calibrate on; None loads what the run's configuration names.
        **options: fields of `SearchOptions` (agent, rounds, ...) and `device`,
            `progress`; others are the run's.

    Raises:
        ValueError: stage 1 is not finished, experts are trained already, or there is nothing to prune.
        ImportError: naming the extra that installs what the agent needs.
    """
    stored = RunDirectory.open(directory).config
    config = stored.replace(**options)
    refuse_other_than_search(stored, config)
    run = RunDirectory.open(directory, stored.replace(device=config.device, progress=config.progress))
    return _search_finished_base(run, config, dataset or build_data(config))


@one_process
def prune_base_file(config: TrainConfig, dataset: Dataset | None = None) -> tuple[RunDirectory, Pruning]:
    """Begin a run on weights from elsewhere and search its widths, or resume it.

    Args:
        config: its `base` names the weights, its `run_dir` the directory of the run.
        dataset: images to calibrate on; None loads what the configuration names.

    Raises:
        ValueError: the weights do not fit the flags, the directory holds another run, or there is nothing to prune.
    """
    if not config.base:
        raise invalid("base", config.base, "--base FILE with the model's flags, or --run DIR")
    if not config.run_dir:
        raise invalid("run_dir", config.run_dir, "--run_dir DIR, the directory of the run with these weights")
    dataset = dataset or build_data(config)
    refuse_what_cannot_fit(config, dataset.channels, build_device(config))
    _check_prunable(config)
    path = Path(config.run_dir)
    stored = RunDirectory.open(path) if (path / "config.json").is_file() else None
    if stored and stored.identity == keep_decisions(stored.config, config).identity:
        config = config.replace(resume=config.run_dir)
    else:
        refuse_unreachable_budgets(config, dataset.channels)
    run = open_run(config, dataset)
    return run, _search_finished_base(run, config, dataset)


def search_run(run: RunDirectory, config: TrainConfig, base: UNet, dataset: Dataset | None = None) -> Pruning:
    """Search the experts' widths on the run's base and write widths.json, replacing an earlier one.

    Resumes the search in the run's memory.jsonl; the memory of a search of other settings is kept as memory.N.jsonl.
    Draws the search into search.png and widths.png, and together with earlier ones into agents.png. Of several
    processes the first one searches and all of them measure (`tdc_fast.training.parallel_search`).

    Args:
        run: the run.
        config: the run's own, or with other options of the search.
        base: as `build_base` gives it.
        dataset: images to calibrate on; None loads what the configuration names.
    """
    with seeded(derived_seed(config.seed, "pruning")):
        with closing(open_stream(config, dataset, "pruning")) as stream:
            batches = list(islice(stream, config.calibration_batches))
        parallel = _parallel_search(config, base, batches)
        return parallel.run(lambda: _search_with(parallel, run, config, base, batches, dataset))


def _parallel_search(config: TrainConfig, base: UNet, batches: Sequence[Batch]) -> ParallelSearch:
    """What the processes of the run measure together."""
    seed, dtype, diffusion = _seed(config), calibration_dtype(config), build_diffusion(config)

    def taylor() -> Callable[[tuple[int, int]], Importance]:
        measure = TaylorImportance(base, base.pruning_units(), diffusion, dtype)
        return lambda interval: measure.of(batches, interval, seed=seed)

    def scorer() -> DenoisingLoss:
        most = config.calibration_batches
        return DenoisingLoss(
            base, diffusion, batches, max_batches=most, seed=seed, max_samples=config.score_samples, dtype=dtype
        )

    return ParallelSearch(world(), taylor, scorer)


def _seed(config: TrainConfig) -> int:
    """The seed of what a search measures."""
    return derived_seed(config.seed, "importance") % 2**31


def _search_with(
    parallel: ParallelSearch,
    run: RunDirectory,
    config: TrainConfig,
    base: UNet,
    batches: Sequence[Batch],
    dataset: Dataset | None,
) -> Pruning:
    finish_commit(run)
    groups = groups_of(run)
    macs = base_macs(run, base)
    difficulty, spent = _difficulty(config, base, groups, dataset)
    try:
        found = _search(parallel, run, config, base, groups, batches, difficulty)
    except OtherSearch as other:
        kept = set_aside(run.path)
        print(f"note: {other}; that one is kept as {kept.name}, and a new search begins", flush=True)
        found = _search(parallel, run, config, base, groups, batches, difficulty)
    draw_search(run.path, found, base.pruning_units())
    searched = {name: getattr(config, name) for name in ("agent", "rounds", "candidates", "memory")}
    if config.budget_in != "macs":
        searched |= {"budget_in": config.budget_in, "latency_table": config.latency_table}
    if found.base_latency is not None:
        searched["base_latency"] = found.base_latency
    found.plan.save(run.path / NEXT_PLAN)
    hashed = plan_hash(found.plan)
    write_phase(run, macs, "pruning", macs=found.calibration_macs + spent, **searched, widths_hash=hashed)
    finish_commit(run)
    return found


def build_agents(config: TrainConfig) -> tuple[Agent, Agent | None]:
    """The agent that the options name, and its stand-in for rounds in which it fails.

    Raises:
        ImportError: naming the extra that installs what the agent needs.
    """
    if config.agent != "llm":
        return resolved_agent(config.agent, config.rounds, config.importance), None
    agent = make_agent(
        "llm",
        model=config.llm_model,
        url=config.llm_url,
        timeout=config.llm_timeout,
        retries=config.llm_retries,
        max_calls=config.llm_calls,
    )
    return agent, make_agent(config.llm_fallback)


def prunes(config: TrainConfig) -> bool:
    """Whether any group's budget is below the whole base."""
    shares = comma_numbers("budgets", config.budgets, float)
    return bool(config.groups) and (min(shares) if shares else config.k) < 1


def refuse_unreachable_budgets(config: TrainConfig, in_channels: int) -> None:
    """Refuse budgets that no widths of the base meet, before it is trained.

    With an open number of groups (`--groups -1`) they are known, and checked, only after stage 1; a table of times is
    checked at once but for its number of groups, also where nothing is pruned.

    Args:
        config: the options of the run.
        in_channels: channels of its images.

    Raises:
        ValueError: naming --budgets or --k, or what does not fit in the table.
    """
    if config.groups < 1 or not prunes(config):
        check_table(config)
        return
    shares = comma_numbers("budgets", config.budgets, float)
    with torch.random.fork_rng(devices=[]):
        least, full, measure = outline_costs(config, in_channels)
    if shares:
        allowed = {f"group {group}": budget_of(share, full) for group, share in enumerate(shares)}
    else:  # which group is the easiest may be known only after stage 1
        allowed = {"the easiest group": budget_of(budget_law(config.groups, config.k)[0], full)}
    name = "budgets" if shares else "k"
    check_reachable(getattr(config, name), allowed, least, full, name, measure)


def refuse_other_than_search(stored: TrainConfig, wanted: TrainConfig) -> None:
    """Refuse options other than those of the search that differ from the run's and may not change.

    Args:
        stored: the run's options.
        wanted: the options to search with.

    Raises:
        ValueError: naming the option.
    """
    own = {field.name: getattr(stored, field.name) for field in dataclasses.fields(SearchOptions)}
    refuse_changed_options(stored, wanted.replace(**own))


def _search(
    parallel: ParallelSearch,
    run: RunDirectory,
    config: TrainConfig,
    base: UNet,
    groups: TimestepGroups,
    batches: Sequence[Batch],
    difficulty: str | Sequence[float],
) -> Pruning:
    agent, stand_in = build_agents(config)
    settings = PruningSettings(
        k=comma_numbers("budgets", config.budgets, float) or config.k,
        k_name="budgets" if config.budgets else "k",
        importance=config.importance,
        difficulty=difficulty,
        max_batches=config.calibration_batches,
        rounds=config.rounds,
        candidates=config.candidates,
        use_memory=config.memory,
        max_samples=config.score_samples,
        seed=_seed(config),
        dtype=calibration_dtype(config),
        shared_layers=config.shared_layers,
        budget_in=config.budget_in,
        latency=latency_model(config, groups.num_groups),
        width_step=width_step(config, groups.num_groups),
    )
    return plan_pruning(
        base,
        groups,
        build_diffusion(config),
        batches,
        settings,
        agent=agent,
        stand_in=stand_in,
        memory_file=run.path / MEMORY_FILE,
        helpers=None if parallel.alone else parallel,
        progress=BarAndTable(always=config.progress == "always", bars=config.progress != "never"),
    )


def _difficulty(
    config: TrainConfig, base: UNet, groups: TimestepGroups, dataset: Dataset | None
) -> tuple[str | list[float], int]:
    """The difficulty of the groups: an order by SNR, or each group's measured loss; and the MACs of measuring it."""
    if "loss" not in config.difficulty:
        return config.difficulty, 0
    seed = derived_seed(config.seed, "difficulty") % 2**31
    with closing(open_stream(config, dataset, "difficulty")) as stream, MacCounter() as counter:
        losses = probe_losses(
            base,
            groups,
            build_diffusion(config),
            stream,
            max_batches=config.calibration_batches,
            seed=seed,
            dtype=calibration_dtype(config),
        )
    sign = -1 if config.difficulty.endswith("reversed") else 1
    return [sign * float(loss) for loss in losses], counter.macs


def _search_finished_base(run: RunDirectory, config: TrainConfig, dataset: Dataset) -> Pruning:
    _check_prunable(config)
    _refuse_trained_experts(run)
    _check_stage1(run)
    again = f"the same command continues from {run.path / MEMORY_FILE}"
    with saying_what_is_safe(run, again), run.writing():
        state = train_base(run, dataset)
        group_timesteps(run, state, dataset)
        return search_run(run, config, build_base(run, state), dataset)


def _check_prunable(config: TrainConfig) -> None:
    if not config.groups:
        raise invalid(
            "groups",
            config.groups,
            "a run with --groups N; a plain one is the base of a new run: --base DIR --run_dir NEW --config "
            "DIR/config.json --groups N --stage2_steps STEPS",
        )
    if not prunes(config):
        raise invalid("k", config.k, "below 1, or --budgets: every expert may keep the whole base, nothing is pruned")
    warn_of_few_calibration_images(config)
    calibration_dtype(config)  # what the device cannot do is refused before anything begins
    build_agents(config)


def _check_stage1(run: RunDirectory) -> None:
    if run.config.base:
        return
    steps, wanted = finished_steps(run.stage_directory("base")), stage1_steps(run.config)
    if not steps or (wanted is not None and steps[-1] < wanted):
        have = f"step {steps[-1]} of {wanted}" if steps else "no checkpoint"
        raise invalid(
            "run",
            f"{run.path}, whose stage 1 has {have}",
            f"a finished one: python -m tdc_fast.train --resume {run.path} --stop_after stage1 trains it",
        )


def _refuse_trained_experts(run: RunDirectory) -> None:
    """ValueError where stage 2 has a checkpoint: its experts have the widths they were trained with."""
    directory = run.stage_directory("experts")
    steps = finished_steps(directory)
    if steps:
        raise invalid(
            "run",
            f"{directory} with checkpoints of steps {steps}",
            "a run whose experts are not trained yet, since other widths would not fit them; split its base again with "
            f"python -m tdc_fast.prune --base {run.path} --run_dir NEW --config {run.path / 'config.json'}",
        )
