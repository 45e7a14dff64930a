"""A whole training run: every phase that its configuration asks for, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from tdc_fast.data.dataset import Dataset
from tdc_fast.data.latents import LatentDataset
from tdc_fast.distributed import first_on_machine, on_all, refuse_device, world
from tdc_fast.errors import invalid
from tdc_fast.runs.build import build_data, build_device, build_diffusion, check_label_rows, refuse_what_cannot_fit
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.opening import open_run
from tdc_fast.runs.processes import many_processes
from tdc_fast.training.base import train_base
from tdc_fast.training.elastic import for_many_processes
from tdc_fast.training.experts import train_experts
from tdc_fast.training.grouping import group_timesteps
from tdc_fast.training.interrupts import interrupts_named, saying_what_is_safe
from tdc_fast.training.messages import (
    describe_cost,
    describe_groups,
    describe_plan,
    describe_widths,
    warn_of_few_calibration_images,
    warn_of_idle_steps,
    warn_of_small_batches,
)
from tdc_fast.training.pruning import build_agents, prune_base, prunes, refuse_unreachable_budgets


@many_processes
def train(config: TrainConfig, dataset: Dataset | None = None) -> RunDirectory:
    """Run all phases that the configuration asks for, or the rest of them with `config.resume`.

    Started by torchrun, the processes divide the work; the first one writes and prints.

    Args:
        config: describes the run.
        dataset: images to train on instead of what `config.data_dir` names, such as an
            `ImageDataset`.

    Returns:
        The run directory; `tdc_fast.training.load_run` reads models from it.

    Raises:
        ValueError: an impossible configuration, or a checkpoint that is damaged or foreign.
        TrainingInterrupted: stopped by Ctrl-C; says what is saved and how to go on.
        OSError: a file cannot be written or read; says what is safe and how to go on.
    """
    if not isinstance(config, TrainConfig):
        raise invalid("config", type(config).__name__, "a TrainConfig")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    wanted, size = config, world().size
    config = world().from_first(lambda: for_many_processes(wanted, size))
    given = dataset
    dataset = world().together(lambda: _checked(config, given))
    _refuse_other_images(config, dataset)
    run = world().from_first(lambda: open_run(config, dataset))
    with saying_what_is_safe(run), interrupts_named(run), _sole_writer(run):
        print(describe_plan(run, dataset), flush=True)
        skipped = _report_skipped(dataset, 0)
        try:
            _run_phases(run, dataset)
        finally:  # corrupt files of a folder too large for memory are found while training
            _report_skipped(dataset, skipped)
    return run


def _checked(config: TrainConfig, dataset: Dataset | None) -> Dataset:
    """The images to train on, once nothing is found that the run could not do."""
    refuse_device(config.device, build_device(config))
    build_diffusion(config).check_x0_is_defined("diffusion_steps")
    if dataset is None:
        dataset = build_data(config.with_moved_data())
    else:
        _check_dataset(dataset, config)
    # A weight, its gradient, two moments of AdamW, and averages; weights from before a step at rates of their own.
    copies = 4 + len(config.ema_rates) + bool(config.stage2_lr_factors)
    refuse_what_cannot_fit(config, dataset.channels, build_device(config), copies=copies)
    warn_of_idle_steps(config)
    if config.groups > 0:
        warn_of_small_batches(config, config.groups)
    if prunes(config):
        warn_of_few_calibration_images(config)
        build_agents(config)  # a library that the search needs is missed here, not after stage 1
    if not config.resume:
        refuse_unreachable_budgets(config, dataset.channels)
    if isinstance(dataset, LatentDataset) and first_on_machine():
        dataset.shards.check_contents()
    return dataset


def _refuse_other_images(config: TrainConfig, dataset: Dataset) -> None:
    """ValueError unless all processes have as many images: else their batches would not be parts of one."""
    most, least = world().largest(len(dataset), -len(dataset))
    if most != -least:
        name = "latents" if config.latents else "data_dir"
        remedy = f"the same images for every process; one has {-least}, and another {most}"
        raise on_all(invalid(name, getattr(config, name), remedy))


@contextmanager
def _sole_writer(run: RunDirectory) -> Iterator[None]:
    """Lock the run in the process that writes to it."""
    with ExitStack() as stack:
        world().by_first(lambda: stack.enter_context(run.writing()))
        yield


def _run_phases(run: RunDirectory, dataset: Dataset) -> None:
    base = train_base(run, dataset)
    if not run.config.groups or run.config.stop_after == "stage1":
        return
    groups = group_timesteps(run, base, dataset)
    print(describe_groups(groups), flush=True)
    if run.config.groups < 0:  # their number was not known before
        warn_of_small_batches(run.config, groups.num_groups)
    widths = prune_base(run, base, dataset)
    if world().first:
        print(describe_widths(run, widths), flush=True)
    if run.config.stop_after != "pruning":
        train_experts(run, base, widths, dataset)
        if world().first:
            print(describe_cost(run), flush=True)


def _check_dataset(dataset: Dataset, config: TrainConfig) -> None:
    if not hasattr(dataset, "image_size"):
        raise invalid("dataset", type(dataset).__name__, "an ImageDataset, such as ImageDataset.from_array(images)")
    if dataset.image_size != config.image_size:
        raise invalid("image_size", config.image_size, f"{dataset.image_size}, as the images of dataset have")
    if config.class_cond and dataset.labels is None:
        raise invalid("class_cond", config.class_cond, "False, as dataset has no labels")
    if not config.class_cond and dataset.labels is not None:
        raise invalid("class_cond", config.class_cond, "True, as dataset has labels, or a dataset without them")
    if config.in_channels not in (0, dataset.channels):
        raise invalid("in_channels", config.in_channels, f"{dataset.channels}, as the images of dataset have")
    check_label_rows(config, dataset.num_classes, "dataset")


def _report_skipped(dataset: Dataset, known: int) -> int:
    """Print how many images were left out, if there are more than `known`; return their number."""
    skipped = dataset.skipped
    if skipped > known:
        print(f"left out {skipped} corrupt image{'s' if skipped > 1 else ''}", flush=True)
    return skipped
