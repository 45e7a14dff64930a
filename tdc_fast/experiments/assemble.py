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
from tdc_fast.experiments.contestants import SETTINGS, Contestant
from tdc_fast.experiments.jobs import read_progress
from tdc_fast.experiments.measure import Measured, MeasuringProtocol, Yardsticks
from tdc_fast.report.numbers import Comparison, Curve, ExpertWidths, ModelResult
from tdc_fast.runs.loading import Run, load_run

SEED_NOTE = (
    "The intervals on this page cover the noise of measuring, not that of training: run the same command with --seed 1 "
    "to see what another training seed changes."
)
NO_SMALL_BATCH_CONTROL = (
    "The uniform baseline with small batches is missing. Stage 2 trains each expert in many steps on few images, which "
    "also helps a uniform model; part of the experts' gain may come from it."
)


def compare_runs(
    first: Contestant,
    models: Sequence[Contestant],
    measured: dict[str, Measured],
    yardsticks: Yardsticks,
    protocol: MeasuringProtocol,
    options: dict[str, Any],
    seconds: dict[str, float],
) -> Comparison:
    """Collect all numbers of the demo.

    Args:
        first: the shared stage 1.
        models: the compared models, the yardstick first.
        measured: measurements by the key of the model.
        yardsticks: what the samples were compared with.
        protocol: how the models were measured.
        options: the demo's options, for the report's settings.
        seconds: time taken, by job.
    """
    stage1 = load_run(first.directory)
    results = tuple(_result(stage1, model, measured[model.key], protocol) for model in models)
    reference = yardsticks.reference
    chosen = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))[:100]
    missing = () if any(model.key == "uniform-80-small" for model in models) else (NO_SMALL_BATCH_CONTROL,)
    return Comparison(
        title="Divide-and-conquer training on 8×8 digits",
        subtitle=(
            "One uniform denoiser against experts for four groups of timesteps, whole and pruned; same data, same "
            "shared first stage, training compute measured in multiply-accumulates."
        ),
        models=results,
        boundaries=protocol.boundaries,
        snr_db=tuple(float(value) for value in stage1.diffusion.snr_db()),
        widths=_widths(load_run(next(m for m in models if m.key == "pruned").directory)),
        floors=yardsticks.floors,
        feature_space=yardsticks.feature_space,
        reference=f"all {len(reference)} real digits",
        sampler=f"DDIM, {protocol.sampling_steps} steps",
        real_images=reference[chosen],
        settings={
            "model and training": {name: value for name, value in SETTINGS.items() if value != ""},
            "this job": options,
            "experts": _expert_settings(models),
        },
        environment=describe_environment(),
        seed_note=SEED_NOTE,
        missing=missing,
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
        after = _Rows(run.path / "experts" / "progress.csv", "g", 0, start, last / steps)
    else:
        after = _Rows(run.path / "progress.csv", "q", shared["steps"], shared["macs"], last / steps)
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
        suffix: letter before the group in the names of the loss columns: "g" for groups, "q" for the quartiles that
            uniform training logs; both are the same intervals here.
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
    whole = (run.macs or {})["per_sample"]["forward"]["base"]
    return ExpertWidths(
        units=tuple(unit.name for unit in units),
        channels=tuple(unit.channels for unit in units),
        widths=tuple(
            tuple(plan.expert_widths(expert)[unit.name] for expert in range(len(plan.experts))) for unit in units
        ),
        budgets=tuple(budget / whole for budget in plan.budgets),
        macs=tuple(macs / whole for macs in plan.macs),
    )


def _expert_settings(models: Sequence[Contestant]) -> dict[str, Any]:
    config = next(model for model in models if model.key == "pruned").config
    names = ("groups", "grouping", "difficulty", "k", "importance", "calibration_batches", "stage2_batch")
    return {name: getattr(config, name) for name in names}


def describe_environment() -> dict[str, str]:
    """Versions of the packages that decide the numbers, the kernels in use, and the machine."""
    found = {"tdc_fast": tdc_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "scikit-learn", "torchmetrics", "matplotlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["operators"] = _operators()
    found["machine"] = f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} logical cores"
    return found


def _operators() -> str:
    try:
        native: Any = importlib.import_module("tdc_fast._native")
    except ImportError:
        return "plain torch (no native core)"
    return f"native, {native.cpu_isa()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
