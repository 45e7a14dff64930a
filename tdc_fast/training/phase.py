"""What the phases of a run share: data streams, the base, the groups, and entries in macs.json."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.data.dataset import Dataset
from tdc_fast.data.stream import BatchStream
from tdc_fast.distributed import world
from tdc_fast.errors import invalid
from tdc_fast.models.iddpm import UNet
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_data, build_device, build_diffusion
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import load_groups
from tdc_fast.runs.weights import base_with_weights
from tdc_fast.training import cost
from tdc_fast.training.random_state import derived_seed

State = dict[str, Tensor]
"""The state dict of a base."""


def open_stream(
    config: TrainConfig, dataset: Dataset | None, phase: str, batch_size: int = 0, device: torch.device | None = None
) -> BatchStream:
    """The shuffled batches of a phase, in an order of its own. The caller closes the stream.

    Args:
        config: names the data and the seed.
        dataset: the images; None loads what the configuration names.
        phase: decides the order, together with the seed.
        batch_size: images per batch; 0 takes `config.batch_size`.
        device: where the batches are; None is the CPU.
    """
    seed = derived_seed(config.seed, "data", phase)
    images = dataset or build_data(config)
    # Images in memory are read in less time than a thread takes to get a core from a step on the CPU.
    ahead = images.slow or (device is not None and device.type == "cuda")
    workers = config.workers if ahead else 0
    return BatchStream(images, batch_size or config.batch_size, seed, workers=workers, device=device)


def build_base(run: RunDirectory, state: State) -> UNet:
    """The dense base with the given weights, in evaluation mode, on the run's device."""
    return base_with_weights(run, state, build_device(run.config))


def groups_of(run: RunDirectory) -> TimestepGroups:
    """The groups in groups.json, for the phases that need experts.

    Raises:
        ValueError: the run is plain training, or has no groups yet.
    """
    if not run.config.groups:
        raise invalid("groups", run.config.groups, "at least 1 for a stage of experts")
    return world().from_first(lambda: load_groups(run))


def image_shape(run: RunDirectory) -> tuple[int, int, int]:
    """(C, H, W) of the run's images."""
    return (run.in_channels, run.config.image_size, run.config.image_size)


def num_classes(config: TrainConfig) -> int | None:
    """Number of classes of a conditional model, None for an unconditional one."""
    return config.num_classes if config.class_cond else None


def base_macs(run: RunDirectory, base: UNet) -> cost.SampleMacs:
    """MACs per sample of the base, from macs.json if stage 1 has written them, else measured."""
    known = world().from_first(lambda: run.read("macs.json"))
    if known is None:
        return cost.training_macs(base, build_diffusion(run.config), image_shape(run), None, num_classes(run.config))
    per_sample = known["per_sample"]
    return cost.SampleMacs((per_sample["forward"]["base"],), (per_sample["forward_backward"]["base"],))


def spent_macs(run: RunDirectory, base: cost.SampleMacs) -> int:
    """MACs of all phases before stage 2.

    A base of unknown cost counts as --stage1_share of the baseline.

    Args:
        run: the run.
        base: MACs per sample of the base.
    """
    known = (world().from_first(lambda: run.read("macs.json")) or {}).get("phases", {})
    total = 0
    for phase in ("stage1", "grouping", "pruning"):
        macs = known.get(phase, {}).get("macs", 0)
        total += round(run.config.stage1_share * cost.baseline_macs(run.config, base)) if macs is None else macs
    return total


def write_phase(
    run: RunDirectory, base: cost.SampleMacs, phase: str, *, experts: cost.SampleMacs | None = None, **facts: Any
) -> None:
    """Write the entry of one phase into macs.json, unless it is there already.

    Args:
        run: the run.
        base: MACs per sample of the base.
        phase: "stage1", "grouping", "pruning" or "stage2".
        experts: MACs per sample of the experts, once they exist.
        **facts: JSON values about the phase, `macs` among them.
    """
    if not world().first:
        return
    known = run.read("macs.json") or {}
    summary = cost.summary(run.config, base, experts, {**known.get("phases", {}), phase: facts})
    if experts is None:  # those of a later phase, in a run that is resumed
        for kind, macs in summary["per_sample"].items():
            macs["experts"] = known.get("per_sample", {}).get(kind, {}).get("experts")
    if summary != known:
        run.write("macs.json", summary)
