"""Collect finished runs and their measurements into the comparison that the report shows."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tdc_fast
from tdc_fast.evaluation.frechet import DistanceSpread
from tdc_fast.experiments.contestants import Contestant
from tdc_fast.experiments.jobs import read_progress
from tdc_fast.experiments.measure import Measured, MeasuringProtocol, Reference, base_time
from tdc_fast.pruning.latency.setting import processor_name
from tdc_fast.report.numbers import Comparison, Curve, ExpertWidths, ModelResult
from tdc_fast.runs.loading import Run, load_run

EXPERT_SETTINGS = (
    *("groups", "grouping", "difficulty", "k", "budget_in", "latency_table", "width_step", "importance"),
    *("calibration_batches", "stage2_batch"),
)
"""The settings of the pruned experts that a report lists."""


@dataclass(frozen=True)
class Subject:
    """What a comparison is about, in the words and settings of its report.

    Attributes:
        title: heading of the report.
        subtitle: what is compared, in one sentence.
        images: what the real images are, such as "digits".
        settings: settings of all models.
        options: options of the experiment.
        pruned: key of the model whose groups, budgets and widths are shown.
        seed_note: what the report says about training seeds.
        missing: sentences on controls that were left out.
    """

    title: str
    subtitle: str
    images: str
    settings: dict[str, Any]
    options: dict[str, Any]
    pruned: str
    seed_note: str
    missing: tuple[str, ...] = ()


def compare_runs(
    subject: Subject,
    first: Contestant,
    models: Sequence[Contestant],
    measured: dict[str, Measured],
    reference: Reference,
    protocol: MeasuringProtocol,
    seconds: dict[str, float],
) -> Comparison:
    """Collect all numbers of a comparison.

    Args:
        subject: what it is about.
        first: the shared stage 1.
        models: the compared models, the baseline first.
        measured: measurements by the key of the model.
        reference: what the samples were compared with.
        protocol: how the models were measured.
        seconds: time taken, by job.
    """
    stage1 = load_run(first.directory)
    results = tuple(_result(stage1, model, measured[model.key], protocol) for model in models)
    chosen = torch.randperm(len(reference.images), generator=torch.Generator().manual_seed(0))[:100]
    pruned = next(model for model in models if model.key == subject.pruned)
    return Comparison(
        title=subject.title,
        subtitle=subject.subtitle,
        models=results,
        boundaries=protocol.boundaries,
        snr_db=tuple(float(value) for value in stage1.diffusion.snr_db()),
        widths=_widths(load_run(pruned.directory)),
        floors=reference.floors,
        feature_space=reference.feature_space,
        reference=f"all {len(reference.images)} real {subject.images}",
        sampler=f"DDIM, {protocol.sampling_steps} steps",
        real_images=reference.images[chosen],
        settings={
            "model and training": {name: value for name, value in subject.settings.items() if value != ""},
            "this job": subject.options,
            "experts": {name: value for name in EXPERT_SETTINGS if (value := getattr(pruned.config, name)) != ""},
        },
        environment=describe_environment(),
        seed_note=subject.seed_note,
        missing=subject.missing,
        seconds=seconds,
    )


def _result(stage1: Run, model: Contestant, measured: Measured, protocol: MeasuringProtocol) -> ModelResult:
    run = load_run(model.directory)
    phases, steps = training_phases(stage1, run)
    shared = _phases(stage1)["stage1"]
    before = _Rows(stage1.path / "progress.csv", "q", 0, 0.0, shared["macs"] / shared["steps"])
    *_, last = phases.values()
    if run.config.groups:
        start = sum(phases.values()) - last
        intervals = "g" if run.config.groups == len(protocol.boundaries) - 1 else "q"
        after = _Rows(model.progress, intervals, 0, start, last / steps)
    else:
        after = _Rows(model.progress, "q", shared["steps"], shared["macs"], last / steps)
    return ModelResult(
        key=model.key,
        label=model.label,
        family=model.family,
        description=model.description,
        phases=phases,
        steps={"stage 1": shared["steps"], list(phases)[-1]: steps},
        parameters=measured.parameters,
        sampling_macs=measured.macs_per_image,
        heldout=measured.heldout,
        frechet=DistanceSpread(protocol.samples, measured.distances),
        curve=_curve((before, after), len(protocol.boundaries) - 1),
        samples=measured.samples,
        sampling_time=measured.time_share,
    )


def training_phases(stage1: Run, run: Run) -> tuple[dict[str, float], int]:
    """The training cost of a run that continued from a stage 1.

    Args:
        stage1: the run that holds stage 1.
        run: the run that started from its weights.

    Returns:
        MACs by phase, those of stage 1 included, and the number of steps of the run itself.
    """
    shared, own = _phases(stage1)["stage1"], _phases(run)
    phases: dict[str, float] = {"stage 1": shared["macs"]}
    if run.config.groups:
        for phase in ("grouping", "pruning"):
            if own.get(phase, {}).get("macs"):
                phases[phase] = own[phase]["macs"]
        phases["stage 2"] = own["stage2"]["macs"]
        return phases, own["stage2"]["steps"]
    steps = own["stage1"]["steps"] - shared["steps"]
    per_sample = (run.macs or {})["per_sample"]["forward_backward"]["base"]
    phases["uniform training"] = steps * run.config.batch_size * per_sample
    return phases, steps


def _phases(run: Run) -> dict[str, Any]:
    return (run.macs or {})["phases"]


@dataclass(frozen=True)
class _Rows:
    """The rows of a progress.csv, and the training cost that they correspond to.

    Attributes:
        path: the progress.csv.
        suffix: letter before the group in the names of the loss columns: "g" for groups, "q" for the quarters of the
            timesteps that every run logs; both are the same intervals where there are four uniform groups.
        first_step: rows up to this step are left out.
        start_macs: MACs spent up to that step.
        macs_per_step: MACs of each step after it.
    """

    path: Path
    suffix: str
    first_step: int
    start_macs: float
    macs_per_step: float


def _curve(parts: Sequence[_Rows], num_groups: int) -> Curve:
    macs: list[float] = []
    losses: list[list[float | None]] = [[] for _ in range(num_groups)]
    for part in parts:
        for row in read_progress(part.path):
            step = int(row["step"])
            if step <= part.first_step:
                continue
            macs.append(part.start_macs + (step - part.first_step) * part.macs_per_step)
            for group in range(num_groups):
                value = row[f"loss_{part.suffix}{group}"]
                losses[group].append(float(value) if value else None)
    return Curve(tuple(macs), tuple(tuple(values) for values in losses))


def _widths(run: Run) -> ExpertWidths:
    plan = run.widths
    assert plan is not None
    units = run.base().pruning_units()
    whole, base = (run.macs or {})["per_sample"]["forward"]["base"], base_time(run)
    return ExpertWidths(
        units=tuple(unit.name for unit in units),
        channels=tuple(unit.channels for unit in units),
        widths=tuple(
            tuple(plan.expert_widths(expert)[unit.name] for expert in range(len(plan.experts))) for unit in units
        ),
        budgets=tuple(budget / whole for budget in plan.budgets),
        macs=tuple(macs / whole for macs in plan.macs),
        times=tuple(ns / base for ns in plan.latency) if base else (),
        time_budgets=tuple(ns / base for ns in plan.latency_budgets) if base else (),
        base_ms=(base or 0) / 1e6,
        boundaries=plan.boundaries,
    )


def describe_environment() -> dict[str, str]:
    """Versions of the packages that decide the numbers, the kernels in use, and the machine."""
    found = {"tdc_fast": tdc_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "scikit-learn", "matplotlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["operators"] = _operators()
    found["machine"] = f"{platform.system()} {platform.machine()}, {processor_name()}, {os.cpu_count()} logical cores"
    return found


def _operators() -> str:
    try:
        native: Any = importlib.import_module("tdc_fast._native")
    except ImportError:
        return "plain torch (no native core)"
    return f"native, {native.cpu_isa()}"
