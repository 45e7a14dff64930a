"""The demo, from its options to the report; a second call only does what is missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import cpu_count
from pathlib import Path
from typing import Annotated, Any

from tdc_fast.atomic import write_json
from tdc_fast.errors import invalid
from tdc_fast.experiments.assemble import Subject, compare_runs
from tdc_fast.experiments.contestants import SETTINGS, Contestant, contestants, stage1
from tdc_fast.experiments.folder import begun_with
from tdc_fast.experiments.jobs import Job, contest_job, run_jobs, training_job
from tdc_fast.experiments.measure import MeasuringProtocol, load_measured, load_reference, prepare_reference
from tdc_fast.report import write_report
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.groups import build_groups
from tdc_fast.runs.limits import PathText, Within, check_limits
from tdc_fast.runs.options import TimeOptions, time_options
from tdc_fast.training.pruning import refuse_unreachable_budgets

FULL_STEPS = 3000
SEED_NOTE = (
    "The intervals on this page cover the noise of measuring, not that of training: run the same command with --seed 1 "
    "to see what another training seed changes."
)
NO_SMALL_BATCH_CONTROL = (
    "The uniform baseline with small batches is missing. Stage 2 trains each expert in many steps on few images, which "
    "also helps a uniform model; part of the experts' gain may come from it."
)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(TimeOptions):
    """Baselines and experts on scikit-learn's digits, and a report that compares them."""

    out: PathText = "runs/demo"
    """Folder for the runs and the report."""
    scale: float = 1.0
    """Length of training: 1 is a baseline of 3000 steps; 0.25 takes about a quarter of the time."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Training seed."""
    samples: Annotated[int, Within(2, 10**7)] = 5000
    """Images per draw of a model."""
    draws: Annotated[int, Within(1, 10**4)] = 3
    """Independent draws of each model; their spread is the noise of the Fréchet distance."""
    sampling_steps: Annotated[int, Within(1, 10**6)] = 25
    """DDIM steps."""
    loss_points: Annotated[int, Within(1, 10**6)] = 25
    """Timesteps per group at which the held-out loss is measured."""
    control: bool = True
    """Also train the uniform baseline with small batches, the fair comparison for stage 2."""
    processes: Annotated[int, Within(0, 2**10)] = 0
    """Worker processes of one thread each; 0 starts one per core. The numbers do not depend on it."""


def run_demo(options: DemoOptions, *, in_process: bool = False) -> Path:
    """Train, measure and write the report; what `options.out` already holds of the same demo is kept.

    Args:
        options: what to train and measure, and where.
        in_process: start no worker processes (for tests).

    Returns:
        The path of report.html.

    Raises:
        ValueError: an option is out of range, or the folder holds something else.
        KeyboardInterrupt: stopped by Ctrl-C after saving.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", flush=True)

    _check(options)
    out = Path(options.out)
    _claim(out, options)
    steps = _baseline_steps(options)
    first = stage1(out, steps, options.seed)
    models = _contestants(options)
    groups = build_groups(_pruned(models).config)
    assert groups is not None
    protocol = _protocol(options, groups)
    processes = 0 if in_process else options.processes or cpu_count() or 1
    say(f"C is {steps} steps of a uniform baseline on 64 digits each; {len(models)} models, then the report")
    reference = out / "measured" / "reference.pt"
    results = {model.key: out / "measured" / f"{model.key}.pt" for model in models}
    opening = [training_job(first)]
    if not reference.exists():
        opening.append(Job("classifier and floors", prepare_reference, (reference, options.samples)))
    seconds = run_jobs(opening, processes, say)
    jobs = [contest_job(model, reference, protocol, results[model.key]) for model in _longest_first(models)]
    seconds.update(run_jobs(jobs, processes, say))
    say("writing the report")
    comparison = compare_runs(
        _subject(options),
        first,
        models,
        {key: load_measured(path) for key, path in results.items()},
        load_reference(reference),
        protocol,
        {**seconds, "all": time.monotonic() - began},
    )
    page = write_report(comparison, out, "pruned", ("uniform", *_other_baselines(models)))
    say(f"report: {page.resolve()}")
    return page


def _check(options: DemoOptions) -> None:
    if not 0 < options.scale <= 1000:
        raise invalid("scale", options.scale, "a number above 0 and at most 1000; 1 is the full demo")
    check_limits(DemoOptions, vars(options))


def _claim(out: Path, options: DemoOptions) -> None:
    """Record the options in the folder, or check that it was started with the same ones."""
    recorded, path = _recorded_options(options), out / "demo.json"
    if not begun_with(path, recorded, "demo", DemoOptions):
        refuse_unreachable_budgets(_pruned(_contestants(options)).config, in_channels=1)
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, recorded)


def _baseline_steps(options: DemoOptions) -> int:
    """C in steps."""
    return max(8, round(FULL_STEPS * options.scale))


def _contestants(options: DemoOptions) -> tuple[Contestant, ...]:
    steps = _baseline_steps(options)
    return contestants(Path(options.out), steps, options.seed, options.control, time_options(options))


def _pruned(models: Sequence[Contestant]) -> Contestant:
    return next(model for model in models if model.key == "pruned")


def _subject(options: DemoOptions) -> Subject:
    return Subject(
        title="Divide-and-conquer training on 8×8 digits",
        subtitle=(
            "One uniform denoiser against experts for four groups of timesteps, whole and pruned; same data, same "
            "shared first stage, training compute measured in multiply-accumulates."
        ),
        images="digits",
        settings=SETTINGS,
        options=_recorded_options(options),
        pruned="pruned",
        seed_note=SEED_NOTE,
        missing=() if options.control else (NO_SMALL_BATCH_CONTROL,),
    )


def _recorded_options(options: DemoOptions) -> dict[str, Any]:
    """The options that decide the numbers."""
    return {name: value for name, value in asdict(options).items() if name not in ("out", "processes")}


def _protocol(options: DemoOptions, groups: TimestepGroups) -> MeasuringProtocol:
    return MeasuringProtocol(
        draws=options.draws,
        samples=options.samples,
        sampling_steps=options.sampling_steps,
        points_per_group=options.loss_points,
        boundaries=groups.boundaries,
    )


def _longest_first(models: Sequence[Contestant]) -> list[Contestant]:
    """Long jobs first, so that the workers finish together."""
    order = ("experts", "pruned", "uniform-80-small", "uniform", "uniform-80")
    return sorted(models, key=lambda model: order.index(model.key))


def _other_baselines(models: Sequence[Contestant]) -> list[str]:
    return [model.key for model in models if model.key.startswith("uniform-")]
