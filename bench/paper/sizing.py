"""How long the models of a study may train: its minutes, divided by the measured time of each kind of run.

Every kind of run is trained for a few steps, as in the study itself. The time per step is read from its progress.csv
after the first steps, in which kernels are compiled and graphs captured; the rest of its time counts once per run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.paper.recipes import Recipe, Study, contestant, mean_budget, stage1, stage1_share
from tdc_fast.errors import invalid
from tdc_fast.experiments.contestants import Contestant
from tdc_fast.experiments.jobs import Job, read_progress, run_jobs, training_job
from tdc_fast.experiments.measure import MeasuringProtocol, measure, prepare_reference
from tdc_fast.runs.loading import load_run

WARM_STEPS = 30
"""Steps of each kind of run; those of its first row are not timed."""
ROW_STEPS = 10
"""Steps between two rows of its progress.csv."""
PART_SAMPLES = 500
"""Samples that are drawn to see how long measuring a model takes: one batch."""
RESERVE = 0.1
"""Share of the minutes that is left for what the warm-up does not see."""
MAX_NEEDED = 2000
PASSES = 20
CALIBRATIONS = 10


@dataclass(frozen=True)
class Pace:
    """How fast a kind of run is.

    Attributes:
        step: seconds per step.
        fixed: seconds of a run besides its steps: reading the data, compiling and capturing, pruning, checkpoints.
        macs: MACs of a sample of its experts as a share of the base's, where their budgets are in time and do not say.
    """

    step: float
    fixed: float
    macs: float | None = None


@dataclass(frozen=True)
class Paces:
    """What the warm-up measured.

    Attributes:
        stage1: of stage 1.
        rows: of what follows it, by the key of the recipe; nothing follows it of merged experts.
        reference: seconds to prepare what samples are compared with.
        measuring: seconds to measure a model.
        elapsed: seconds of the warm-up.
    """

    stage1: Pace
    rows: dict[str, Pace]
    reference: float
    measuring: float
    elapsed: float


@dataclass(frozen=True)
class Sizing:
    """What was decided.

    Attributes:
        baseline_steps: C, in uniform steps.
        seconds: what the whole study is expected to take, warm-up included.
        steps: steps of each model after stage 1, by the key of its recipe; at most that many where it is pruned.
    """

    baseline_steps: int
    seconds: float
    steps: dict[str, int]


def least_steps(study: Study, num_images: int) -> int:
    """The smallest C in steps that makes sense.

    Every training image is seen 20 times or C is 2000 steps, and the calibration of pruning, which is part of an
    expert's cost, takes at most a tenth of C.

    Args:
        study: the study, for its batch size and experts.
        num_images: number of training images.
    """
    passes = PASSES * math.ceil(num_images / int(study.settings["batch_size"]))
    calibration = int(study.settings.get("calibration_batches", 4)) * int(study.experts["groups"])
    return max(CALIBRATIONS * calibration, min(MAX_NEEDED, passes))


def decide(study: Study, rows: Sequence[Recipe], paces: Paces, minutes: float, least: int) -> Sizing:
    """The largest C for which the study fits into its minutes, of one training seed.

    Args:
        study: its number of steps is not read.
        rows: the models.
        paces: what the warm-up measured.
        minutes: for everything.
        least: the smallest C in steps that makes sense.

    Raises:
        ValueError: the minutes are too few; says how many are enough.
    """
    shares = {
        recipe.key: _steps_per_step(study, recipe, paces.rows[recipe.key].macs)
        for recipe in rows
        if recipe.merging is None
    }
    first = stage1_share(study, rows[0])
    per_step = first * paces.stage1.step + sum(share * paces.rows[key].step for key, share in shares.items())
    fixed = paces.elapsed + paces.reference + paces.stage1.fixed
    fixed += sum(paces.rows[key].fixed for key in shares) + len(rows) * paces.measuring
    steps = int((60 * minutes * (1 - RESERVE) - fixed) / per_step)
    if steps < least:
        enough = math.ceil((fixed + least * per_step) / (1 - RESERVE) / 6) / 10
        raise invalid(
            "minutes",
            minutes,
            f"at least {enough:g}: {len(rows)} models take that long here if C is {least} steps, the least that makes "
            "sense for these images, of which warm-up, start of every run and measuring take "
            f"{fixed / 60:.1f} minutes; fewer --samples or --draws take less",
        )
    return Sizing(steps, fixed + steps * per_step, {key: round(share * steps) for key, share in shares.items()})


def _steps_per_step(study: Study, recipe: Recipe, macs: float | None) -> float:
    """Steps of a recipe after stage 1 for each step of C; what pruning costs is taken from them later.

    Args:
        study: the study.
        recipe: the recipe.
        macs: MACs of a sample of its experts as a share of the base's; None where its budgets say them.
    """
    left = recipe.cost - stage1_share(study, recipe)
    if recipe.experts is None:
        return left * (study.small_factor if recipe.small_batch else 1)
    experts = {**study.experts, **({} if recipe.mean_budget else recipe.experts)}
    batch = study.small_batch if recipe.small_batch else int(experts["stage2_batch"])
    return left * int(study.settings["batch_size"]) / batch / (macs or mean_budget(experts))


def warm_up(
    study: Study,
    rows: Sequence[Recipe],
    seed: int,
    folder: Path,
    how: MeasuringProtocol,
    processes: int,
    say: Callable[[str], None],
) -> Paces:
    """Train every kind of run for a few steps, and measure one of the models in part.

    Args:
        study: its number of steps is not read.
        rows: the models; those that differ only in their cost are of one kind.
        seed: training seed.
        folder: for the runs.
        how: how the models of the study are measured.
        processes: as for `run_jobs`.
        say: prints a line of progress.
    """
    began = time.monotonic()
    study = dataclasses.replace(
        study,
        baseline_steps=round(WARM_STEPS / stage1_share(study, rows[0])),
        settings={**study.settings, "log_interval": ROW_STEPS},
    )
    first = stage1(study, rows[0], seed, folder)
    first = dataclasses.replace(first, key="warm-up, stage 1", label="warm-up, stage 1")
    kinds: list[Recipe] = []
    trained = [recipe for recipe in rows if recipe.merging is None]
    for recipe in trained:
        if all(_kind(recipe) != _kind(kind) for kind in kinds):
            kinds.append(recipe)
    models = [_briefly(contestant(study, kind, seed, folder)[1]) for kind in kinds]
    reference = folder / "reference.pt"
    jobs = [
        Job("floors", prepare_reference, (reference, how.samples, *study.dataset)),
        training_job(first),
        *map(training_job, models),
        *_measuring_jobs(models[0], reference, how, folder),
    ]
    seconds = run_jobs(jobs, processes, say)
    paces = [_pace(model, seconds[model.label]) for model in models]
    of_kind = [next(i for i, kind in enumerate(kinds) if _kind(kind) == _kind(recipe)) for recipe in trained]
    some, few = seconds["measuring some"], seconds["measuring few"]
    repeated = how.draws * how.samples / min(how.samples, PART_SAMPLES)
    return Paces(
        stage1=_pace(first, seconds[first.label]),
        rows={recipe.key: paces[i] for recipe, i in zip(trained, of_kind, strict=True)},
        reference=seconds["floors"],
        measuring=how.draws * few + repeated * max(0.0, some - few),
        elapsed=time.monotonic() - began,
    )


def _kind(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, key="", label="", cost=1.0)


def _briefly(model: Contestant) -> Contestant:
    """The model with few steps after stage 1."""
    config = model.config
    few = {"stage2_steps": WARM_STEPS} if config.groups else {"lr_anneal_steps": config.lr_anneal_start + WARM_STEPS}
    return dataclasses.replace(model, label=f"warm-up, {model.key}", config=config.replace(**few))


def _pace(model: Contestant, seconds: float) -> Pace:
    rows = [(int(row["step"]), float(row["wall_seconds"])) for row in read_progress(model.progress)]
    (first, began), (last, ended) = rows[0], rows[-1]
    step = (ended - began) / (last - first)
    return Pace(step, max(0.0, seconds - WARM_STEPS * step), _macs_of_times(model))


def _macs_of_times(model: Contestant) -> float | None:
    """The MACs of a sample of experts whose budgets are in time, as a share of the base's; None for other models."""
    if not model.config.groups or model.config.budget_in != "latency":
        return None
    forward = (load_run(model.directory).macs or {})["per_sample"]["forward"]
    return float(np.mean(forward["experts"])) / forward["base"]


def _measuring_jobs(model: Contestant, reference: Path, how: MeasuringProtocol, folder: Path) -> list[Job]:
    """Measuring a model on few samples and on some, each after a first time in which kernels are compiled."""
    samples = min(how.samples, PART_SAMPLES)
    points = max(1, round(how.points_per_group * samples / (how.samples * how.draws)))
    some = dataclasses.replace(how, draws=1, samples=samples, points_per_group=points)
    few = dataclasses.replace(how, draws=1, samples=2, points_per_group=1)
    return [
        Job(name, measure, (model.directory, reference, part, folder / f"{name}.pt"))
        for name, part in (
            ("first measuring of some", some),
            ("first measuring of few", few),
            ("measuring few", few),
            ("measuring some", some),
        )
    ]
