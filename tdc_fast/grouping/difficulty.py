"""Difficulty of timesteps as the base meets it: the measured loss of every probe."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import nn

from tdc_fast.diffusion.calibration import Batch, calibration_losses
from tdc_fast.diffusion.protocols import DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.grouping.probes import Probes
from tdc_fast.nn.modes import evaluating


@torch.no_grad()
def probe_losses(
    model: nn.Module,
    probes: Iterable[tuple[int, int]],
    diffusion: DiffusionProcess,
    batches: Iterable[Batch],
    *,
    max_batches: int = 4,
    seed: int = 0,
) -> np.ndarray:
    """Mean training loss of the base on each interval of timesteps, float64 (P,).

    probes  : intervals (start, stop); Probes or TimestepGroups.
    batches : x0 (B, ...) or (x0, model_kwargs); `max_batches` of them are read, once. Every probe sees the same data
              and noise.
    """
    data = list(islice(batches, max_batches))
    if not data:
        raise invalid("batches", data, "at least one batch of calibration data")
    means = []
    with evaluating(model):
        for interval in probes:
            losses = torch.cat(list(calibration_losses(model, data, diffusion, interval, seed=seed)))
            means.append(float(losses.double().mean()))
    return np.array(means)


def in_decibels(losses: np.ndarray) -> np.ndarray:
    """10 log10 of losses, so that a group holds timesteps whose losses have like ratios. ValueError unless positive."""
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise invalid("losses", losses, "finite numbers above 0")
    return 10 * np.log10(losses)


def mean_over_probes(values: np.ndarray, probes: Probes) -> np.ndarray:
    """Means of per-timestep values (T,) over each probe, (P,)."""
    return np.array([values[start:stop].mean() for start, stop in probes])
