"""Train and measure the models of a table; what an earlier call finished is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.paper.recipes import Recipe, Study, contestant
from tdc_fast.atomic import write_json
from tdc_fast.experiments.assemble import training_phases
from tdc_fast.experiments.contestants import Contestant
from tdc_fast.experiments.jobs import MEASURING, Job, run_jobs, train_and_measure, train_contestant
from tdc_fast.experiments.measure import Measured, MeasuringProtocol, load_measured, measure, prepare_reference
from tdc_fast.nn.merging import Merging
from tdc_fast.pruning.memory import read_trials
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_data
from tdc_fast.runs.loading import load_run
from tdc_fast.training.pruning import refuse_unreachable_budgets

LOSS_INTERVALS = 4  # the held-out loss is measured by quarter of the timesteps, for any groups


@dataclass(frozen=True)
class Outcome:
    """One trained and measured model of one seed.

    Attributes:
        measured: its measurements.
        phases: training MACs by phase.
        boundaries: boundaries of its groups; empty for a uniform model.
        best_scores: best score (loss before fine-tuning) that the search found in each pruned group; empty without a
            search.
    """

    measured: Measured
    phases: dict[str, float]
    boundaries: tuple[int, ...]
    best_scores: tuple[float, ...] = ()

    @property
    def training_macs(self) -> float:
        """MACs of the whole training."""
        return sum(self.phases.values())


def protocol(study: Study, samples: int, draws: int) -> MeasuringProtocol:
    """How the models of a study are measured, with `draws` draws of `samples` images."""
    steps = int(study.settings.get("diffusion_steps", 1000))
    return MeasuringProtocol(
        draws=draws,
        samples=samples,
        sampling_steps=study.sampling_steps,
        points_per_group=study.loss_points,
        boundaries=TimestepGroups.uniform(steps, LOSS_INTERVALS).boundaries,
    )


def run_rows(
    study: Study,
    rows: Sequence[Recipe],
    seeds: Sequence[int],
    folder: Path,
    how: MeasuringProtocol,
    processes: int,
    say: Callable[[str], None],
) -> dict[str, list[Outcome]]:
    """Train and measure all rows with all seeds; returns the outcomes by recipe key, one per seed."""
    reference = folder / f"reference-{how.samples}.pt"
    plan: dict[tuple[str, int], tuple[Contestant, Contestant, Path]] = {}
    opening: dict[Path, Job] = {}
    if not reference.exists():
        opening[reference] = Job("reference", prepare_reference, (reference, how.samples, *study.dataset))
    for seed in seeds:
        home = folder / f"seed{seed}"
        for recipe in rows:
            first, model = contestant(study, recipe, seed, home)
            result = home / "measured" / f"{recipe.key}-{how.samples}x{how.draws}.pt"
            plan[recipe.key, seed] = first, model, result
            if not result.exists():
                opening[first.directory] = Job(
                    f"seed {seed}, {first.key}", train_clocked, (first,), first.progress, first.last_step
                )
    run_jobs(list(opening.values()), processes, say)
    mergings = {recipe.key: recipe.merging for recipe in rows if recipe.merging is not None}
    work = [
        Job(
            f"seed {seed}, {key}",
            measure_clocked,
            (model, reference, how, result),
            model.progress,
            model.last_step,
            MEASURING,
        )
        for (key, seed), (_, model, result) in plan.items()
        if not result.exists() and key not in mergings
    ]
    merging_work = [  # after the runs that are merged have been trained
        Job(f"seed {seed}, {key}", merge_clocked, (model.directory, reference, how, result, mergings[key], key))
        for (key, seed), (_, model, result) in plan.items()
        if not result.exists() and key in mergings
    ]
    began = time.monotonic()
    run_jobs(work, processes, say)
    run_jobs(merging_work, processes, say)
    done = len(work) + len(merging_work)
    say(f"{done} models trained and measured in {(time.monotonic() - began) / 60:.1f} minutes")
    return {
        recipe.key: [_outcome(*plan[recipe.key, seed], merged=recipe.merging is not None) for seed in seeds]
        for recipe in rows
    }


def refuse_what_time_forbids(study: Study, rows: Sequence[Recipe], folder: Path) -> None:
    """Refuse a table of times that does not fit, and budgets in time that no widths meet, before anything is trained.

    Args:
        study: the study.
        rows: its models.
        folder: of its runs.

    Raises:
        ValueError: naming the model and what does not fit.
    """
    channels = None
    for recipe in rows:
        if recipe.experts is not None and recipe.merging is None:
            config = contestant(study, recipe, 0, folder)[1].config
            channels = channels or build_data(config).channels
            try:
                refuse_unreachable_budgets(config, channels)
            except ValueError as error:
                raise ValueError(f"{recipe.label}: {error}") from error


def cpu_minutes(study: Study, rows: Sequence[Recipe], seeds: Sequence[int], folder: Path) -> float | None:
    """CPU minutes that training and measuring the rows took, over all calls; None if some were not recorded."""
    runs = {
        run.directory
        for seed in seeds
        for recipe in rows
        for run in contestant(study, recipe, seed, folder / f"seed{seed}")
    }
    runs |= {folder / f"seed{seed}" / recipe.key for seed in seeds for recipe in rows if recipe.merging is not None}
    clocks = [_clock_of(run) for run in runs]
    if not all(clock.is_file() for clock in clocks):
        return None
    return sum(json.loads(clock.read_text(encoding="utf-8")) for clock in clocks) / 60


def train_clocked(contestant: Contestant) -> None:
    """Train a run and record its CPU time."""
    with _clock(contestant.directory):
        train_contestant(contestant)


def measure_clocked(contestant: Contestant, reference: Path, how: MeasuringProtocol, result: Path) -> None:
    """Train and measure a run and record its CPU time."""
    with _clock(contestant.directory):
        train_and_measure(contestant, reference, how, result)


def merge_clocked(run: Path, reference: Path, how: MeasuringProtocol, result: Path, merging: Merging, key: str) -> None:
    """Measure the merged experts of a run and record the CPU time under the key of their recipe."""
    with _clock(run.with_name(key)):
        measure(run, reference, how, result, merging)


@contextmanager
def _clock(run: Path) -> Iterator[None]:
    """Add the CPU seconds of this block to those recorded for the run; a killed attempt records nothing."""
    began, clock = time.process_time(), _clock_of(run)
    earlier = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
    try:
        yield
    finally:
        clock.parent.mkdir(parents=True, exist_ok=True)
        write_json(clock, earlier + time.process_time() - began)


def _clock_of(run: Path) -> Path:
    return run.parent / "cpu_seconds" / f"{run.name}.json"


def _outcome(first: Contestant, model: Contestant, result: Path, *, merged: bool) -> Outcome:
    """The outcome of a run, or of its experts as one dense model, which costs what they do."""
    run = load_run(model.directory)
    phases, _ = training_phases(load_run(first.directory), run)
    if merged:
        return Outcome(load_measured(result), phases, ())
    boundaries = run.groups.boundaries if run.groups else ()
    return Outcome(load_measured(result), phases, boundaries, _best_scores(model.directory / "memory.jsonl"))


def _best_scores(path: Path) -> tuple[float, ...]:
    if not path.is_file():
        return ()
    best: dict[int, float] = {}
    for trial in read_trials(path):
        if trial.score is not None:
            best[trial.group] = min(trial.score, best.get(trial.group, trial.score))
    return tuple(best[group] for group in sorted(best))
