"""The search for the experts' widths in a run: what stage "pruning" does, and the command ``tdc_fast.prune`` alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from tdc_fast.errors import invalid
from tdc_fast.pruning.agents import Agent, make_agent
from tdc_fast.pruning.memory import OtherSearch, read_trials
from tdc_fast.pruning.progress import BarAndTable
from tdc_fast.pruning.search import Pruning, plan_pruning, resolved_agent
from tdc_fast.pruning.task import Trial
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_diffusion
from tdc_fast.runs.config import TrainConfig, comma_numbers
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.training.random_state import derived_seed

MEMORY = "memory.jsonl"


def build_agents(config: TrainConfig) -> tuple[Agent, Agent | None]:
    """The agent that the options name, and the one that stands in where it fails.

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


def search_run(
    run: RunDirectory, config: TrainConfig, base: Any, groups: TimestepGroups, stream: Any, difficulty: Any
) -> Pruning:
    """Search widths as ``config`` says (the run's own, or with other search options) on the run's base.

    Goes on with the memory.jsonl that the run directory holds, if it is of this search; that of another one is kept as
    memory.N.jsonl. Draws the search into search.png and widths.png, and beside earlier ones into agents.png.
    """
    batches = list(islice(stream, config.calibration_batches))
    try:
        found = _search(run, config, base, groups, batches, difficulty)
    except OtherSearch as other:
        kept = _set_aside_memory(run)
        print(f"note: {other}; that one is kept as {kept.name}, and a new search begins", flush=True)
        found = _search(run, config, base, groups, batches, difficulty)
    _draw(run.path, found, base)
    return found


def _search(
    run: RunDirectory, config: TrainConfig, base: Any, groups: TimestepGroups, batches: list[Any], difficulty: Any
) -> Pruning:
    agent, stand_in = build_agents(config)
    return plan_pruning(
        base,
        groups,
        build_diffusion(config),
        batches,
        k=comma_numbers("budgets", config.budgets, float) or config.k,
        importance=config.importance,
        difficulty=difficulty,
        max_batches=config.calibration_batches,
        agent=agent,
        rounds=config.rounds,
        candidates=config.candidates,
        use_memory=config.memory,
        max_samples=config.score_samples,
        memory_file=run.path / MEMORY,
        stand_in=stand_in,
        progress=BarAndTable(always=config.progress == "always", bars=config.progress != "never"),
        seed=derived_seed(config.seed, "importance") % 2**31,
    )


def _set_aside_memory(run: RunDirectory) -> Path:
    """Rename memory.jsonl to the first free memory.N.jsonl, so that another search can begin."""
    path = run.path / MEMORY
    number = 1
    while (kept := run.path / f"memory.{number}.jsonl").exists():
        number += 1
    path.rename(kept)
    return kept


def searches_of(directory: Path) -> dict[str, list[Trial]]:
    """The trials of every search that a run directory holds, oldest first: {label: trials}.

    The label is the agent's name, with a number where several searches had the same.
    """
    files = sorted(directory.glob("memory.*.jsonl"), key=lambda path: int(path.suffixes[0][1:]))
    found: dict[str, list[Trial]] = {}
    for path in [*files, directory / MEMORY]:
        trials = read_trials(path) if path.is_file() else []
        if not any(trial.score is not None for trial in trials):
            continue
        name = trials[0].agent
        repeated = sum(label == name or label.startswith(name + " ") for label in found)
        found[name if not repeated else f"{name} {repeated + 1}"] = trials
    return found


def refuse_trained_experts(run: RunDirectory) -> None:
    """ValueError where stage 2 has a checkpoint: its experts have the widths they were trained with."""
    from tdc_fast.runs.checkpoint import finished_steps

    directory = run.stage_directory("experts")
    steps = finished_steps(directory)
    if steps:
        raise invalid(
            "run",
            f"{directory} with checkpoints of steps {steps}",
            "a run whose experts are not trained yet, since other widths would not fit them; split its base anew with "
            f"python -m tdc_fast.prune --base {run.path} --run_dir NEW --config {run.path / 'config.json'}",
        )


def _draw(directory: Path, found: Pruning, base: Any) -> None:
    if not any(trial.score is not None for trials in found.trials for trial in trials):
        for picture in ("search.png", "widths.png"):
            (directory / picture).unlink(missing_ok=True)  # an earlier search's, which shows other widths
        return
    try:
        from tdc_fast.pruning.plots import agent_comparison, search_plot, widths_plot

        (directory / "search.png").write_bytes(search_plot(found.trials, found.plan))
        (directory / "widths.png").write_bytes(widths_plot(found.plan, base.pruning_units()))
        searches = searches_of(directory)
        if len(searches) > 1:
            (directory / "agents.png").write_bytes(agent_comparison(searches))
    except ImportError:
        print("search.png and widths.png are left out: they need matplotlib (pip install 'tdc_fast[demo]')")
