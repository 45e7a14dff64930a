"""Opening the run directory of a configuration: a new one, or one that is continued."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdc_fast.data.dataset import Dataset
from tdc_fast.data.latents import LatentFacts, facts_of
from tdc_fast.errors import invalid
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import calibration_dtype, check_cuda_graph, check_shared_layers, split_digest
from tdc_fast.runs.checkpoint import choose_checkpoint, finished_steps, step_of
from tdc_fast.runs.config import IMPROVED_DIFFUSION_CLASSES, TrainConfig, keep_decisions, refuse_changed_options
from tdc_fast.runs.directory import RunDirectory, default_directory
from tdc_fast.runs.groups import build_groups, load_groups, needs_base
from tdc_fast.runs.weights import find_base_file, read_description
from tdc_fast.runs.widths import find_plan


def open_run(config: TrainConfig, dataset: Dataset) -> RunDirectory:
    """The run directory of a configuration: a new one, or with `config.resume` the one that is continued.

    Of a run that is continued all files are checked before anything is written.

    Args:
        config: the configuration.
        dataset: the training images.

    Raises:
        ValueError: the directory holds another run, or nothing that could be resumed, or damaged files; or two
            directories are named.
    """
    refuse_two_directories(config.resume, config.run_dir)
    check_cuda_graph(config)
    calibration_dtype(config)  # refused before anything is written
    check_shared_layers(config, dataset.channels)
    config = _continued_in_place(config)
    path = Path(config.resume if config.resume != "latest" else config.run_dir or default_directory() or "")
    if config.resume == "latest" and not (config.run_dir or default_directory()):
        raise invalid("resume", config.resume, "a run directory, or --run_dir as well")
    if config.resume and (path / "config.json").is_file():
        return _continued(path, config, dataset)
    if config.resume:
        config = config.replace(run_dir=str(path))
    config = config.replace(**config.overrides).replace(override="")
    config = config.replace(**_decisions(config, dataset))
    groups = build_groups(config, report=True)
    split = split_digest(config, dataset)
    run = RunDirectory.create(config, dataset.channels, count_classes(dataset), facts_of(dataset), split)
    if groups is not None:
        groups.save(run.path / "groups.json")
    return run


def count_classes(dataset: Dataset) -> dict[int, int] | None:
    """How many images of a dataset have each class that occurs in it, by ascending class; None without labels."""
    if dataset.labels is None:
        return None
    classes, counts = np.unique(dataset.labels, return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def _continued(path: Path, config: TrainConfig, dataset: Dataset) -> RunDirectory:
    before = RunDirectory.open(path).config
    config = keep_decisions(before, config)
    refuse_changed_options(before, config)
    changes = {name: value for name, value in config.overrides.items() if getattr(before, name) != value}
    run = RunDirectory.open(path, config.replace(**changes).replace(override=""))
    if run.in_channels != dataset.channels:
        raise invalid("data_dir", config.data_dir, f"images of {run.in_channels} channels, as the run had")
    counts = count_classes(dataset)
    if counts and run.class_counts and counts != dict(zip(run.classes or [], run.class_counts, strict=True)):
        remedy = "the images that the run began with; these have other classes, or other numbers of images of them "
        remedy += "(an empty file may stand for a missing image, with --override on_corrupt=skip)"
        raise invalid("data_dir", config.latents or config.data_dir, remedy)
    if run.latents != facts_of(dataset):
        remedy = "the latents, of the same autoencoder and scale, that the run began with"
        raise invalid("latents", config.latents or config.data_dir, remedy)
    groups = _check_files(run)
    _check_overrides(run, changes)
    threads = (run.read("run.json") or {}).get("threads")
    if threads != torch.get_num_threads():
        print(
            f"note: the run began with {threads} threads and continues with {torch.get_num_threads()}: "
            "the last bits may differ",
            file=sys.stderr,
        )
    with run.writing():
        if changes:
            run.record_override(*_place(run), before, changes)
        if groups is not None:
            groups.save(run.path / "groups.json")
    return run


def _check_files(run: RunDirectory) -> TimestepGroups | None:
    """Check everything that a run has written, before anything is written to it.

    Returns:
        The groups that the run lacks and that its options describe; None if it has them, or has yet to measure them.

    Raises:
        ValueError: a file is damaged or belongs to another run; names it.
    """
    macs = run.read("macs.json")
    if macs is not None:
        _check_macs(run.path / "macs.json", macs)
    for stage in ("experts", "base") if run.config.groups else ("base",):
        if stage == "experts" or not run.config.base:
            find_step(run, stage, {"stage": stage, "identity": run.identity})
    if not run.config.groups:
        return None
    described = build_groups(run.config, report=True)
    if (run.path / "groups.json").is_file():
        if load_groups(run) != (described or load_groups(run)):
            path = str(run.path / "groups.json")
            raise invalid("groups", path, "the groups that config.json describes; the file is of another run")
        described = None
    plan = find_plan(run)
    if plan is not None:
        WidthPlan.load(plan)
    return described


def find_step(
    run: RunDirectory, stage: str, expected: Mapping[str, Any], check: Callable[[int], None] = lambda step: None
) -> int | None:
    """The step of a stage to continue from, by `--resume_step`; None for its beginning.

    Args:
        run: the run.
        stage: "base" or "experts".
        expected: what the checkpoint's description must say.
        check: raises ValueError if the content of a checkpoint does not fit.

    Raises:
        ValueError: the checkpoint is damaged or of another run; names the file and the last good checkpoint.
    """
    directory, later = run.stage_directory(stage), run.path / "experts"
    split_already = stage == "base" and run.config.groups and later.exists()
    # resume_step names a checkpoint of the stage that was interrupted: the last one that has a directory.
    wanted = -1 if split_already or not directory.exists() else run.config.resume_step
    try:
        return choose_checkpoint(directory, expected, wanted, run.path, check)
    except ValueError as error:
        if split_already:
            raise ValueError(f"{error} (move {later} away first: its experts came from that base)") from error
        raise


def _check_macs(path: Path, macs: Mapping[str, Any]) -> None:
    try:
        base = (macs["per_sample"]["forward"]["base"], macs["per_sample"]["forward_backward"]["base"])
        spent = [phase["macs"] for phase in macs["phases"].values()]
        whole = all(type(value) is int for value in base) and all(v is None or type(v) is int for v in spent)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise invalid("run", str(path), "the costs that the run wrote; the file is damaged. Restore it from a copy")


def _place(run: RunDirectory) -> tuple[int, str]:
    """The step from which a run goes on, and its stage."""
    stage = "experts" if run.config.groups and finished_steps(run.stage_directory("experts")) else "base"
    steps = finished_steps(run.stage_directory(stage))
    return run.config.resume_step if run.config.resume_step >= 0 else (steps or [0])[-1], stage


def _check_overrides(run: RunDirectory, changes: Mapping[str, Any]) -> None:
    """Refuse changes of what is over already, or of what a computed number of steps depends on."""
    config = run.config
    measured = needs_base(config) and (run.path / "groups.json").is_file()
    split = config.groups and (measured or find_plan(run) or finished_steps(run.stage_directory("experts")))
    for name in changes:
        if split and name in ("stage1_steps", "lr_anneal_steps", "lr_anneal_start"):
            remedy = "options of stage 2 alone: stage 1 is over, and its base is split or measured already"
            raise invalid("override", name, remedy)
        if config.baseline_steps and config.groups and name in ("batch_size", "stage2_batch"):
            remedy = "--microbatch, or a new run: the numbers of steps are computed from --baseline_steps and this size"
            raise invalid("override", name, remedy)
    step, stage = _place(run)
    name = "stage2_steps" if stage == "experts" else "stage1_steps" if config.stage1_steps else "lr_anneal_steps"
    steps = getattr(config, name)
    if changes.keys() & {"stage1_steps", "lr_anneal_steps", "stage2_steps"} and 0 < steps < step:
        remedy = f"at least {step}, the step that the run has reached, or --resume_step as well"
        raise invalid("override", f"{name}={steps}", remedy)


def _decisions(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What a new run decides about the options of `LEFT_OPEN`."""
    source = config.base or config.resume_checkpoint
    made_with: Mapping[str, Any] = {}
    if source:
        path = find_base_file(source) if config.base else Path(source)
        description = read_description(path) or {}
        _refuse_other_space(config, path, description, dataset)
        recorded = description.get("config")
        made_with = recorded if isinstance(recorded, Mapping) else {}
    return {
        "num_classes": _num_classes(config, dataset, made_with),
        "ema_rate": ",".join(config.ema_rates),
        "ema_ramp": _ema_ramp(config, made_with),
    }


def _refuse_other_space(config: TrainConfig, path: Path, description: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse weights that were trained on other latents, or on images where these are latents."""
    if "latents" not in description:
        return
    theirs, ours = LatentFacts.from_dict(description["latents"], "base", str(path)), facts_of(dataset)
    if (theirs and theirs.space) != (ours and ours.space):
        on = "images" if theirs is None else f"latents of another {theirs.space.autoencoder}, or scaled in another way"
        name = "base" if config.base else "resume_checkpoint"
        raise invalid(name, getattr(config, name), f"weights that were trained on such data; these were on {on}")


def _ema_ramp(config: TrainConfig, made_with: Mapping[str, Any]) -> bool:
    """As given; else off with improved-diffusion's flag, and as it was for averages that are continued."""
    if config.ema_ramp is not None:
        return config.ema_ramp
    if config.resume_checkpoint and not config.ema_rate:
        return made_with.get("ema_ramp") is True
    return not config.ema_rate


def _num_classes(config: TrainConfig, dataset: Dataset, made_with: Mapping[str, Any]) -> int:
    """Rows of the label embedding of a new run: as given, as weights from elsewhere have, or as the data needs."""
    if config.num_classes or not config.class_cond:
        return config.num_classes
    needed = config.label_rows_for(dataset.num_classes)
    if not (config.base or config.resume_checkpoint):
        return needed
    rows = made_with.get("num_classes", IMPROVED_DIFFUSION_CLASSES)
    if not isinstance(rows, int) or rows < needed:
        no_class = " and one label row for no class (label_dropout)" if config.label_dropout else ""
        remedy = f"a model of at least the {dataset.num_classes} classes of the data{no_class}; it has {rows} rows"
        name = "base" if config.base else "resume_checkpoint"
        raise invalid(name, getattr(config, name), remedy)
    return rows


def refuse_two_directories(resume: str, run_dir: str) -> None:
    """Refuse a --run_dir that is not the run to resume.

    Args:
        resume: the run to resume; "" for none, "latest" for the one in `run_dir`.
        run_dir: the directory given as that of the run; "" for none.

    Raises:
        ValueError: naming run_dir.
    """
    if resume not in ("", "latest") and run_dir and Path(run_dir).resolve() != Path(resume).resolve():
        raise invalid("run_dir", run_dir, f"none together with --resume {resume}, which is the run directory")


def _continued_in_place(config: TrainConfig) -> TrainConfig:
    """Turn a --resume_checkpoint in the run's own directory into --resume and --resume_step.

    improved-diffusion resumes in the directory of --resume_checkpoint; if one of our runs is there, it is resumed.
    """
    directory = Path(config.run_dir or default_directory() or "")
    checkpoint = Path(config.resume_checkpoint)
    if config.resume or not config.resume_checkpoint or not (directory / "config.json").is_file():
        return config
    if checkpoint.parent.resolve() != directory.resolve():
        return config
    began_with = RunDirectory.open(directory).config.resume_checkpoint
    return config.replace(resume=str(directory), resume_step=step_of(checkpoint), resume_checkpoint=began_with)
