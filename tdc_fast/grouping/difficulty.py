"""The difficulty of timesteps, measured: the base's loss at every probe."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.diffusion.calibration import Batch, Calibration
from tdc_fast.diffusion.protocols import DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.grouping.probes import Probes
from tdc_fast.nn.inference import denoiser_in
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
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Mean training loss of the base on each interval of timesteps, float64 (P,).

    Every probe sees the same data and noise.

    Args:
        model: the base. Its mode is left unchanged.
        probes: P intervals (start, stop), such as Probes or TimestepGroups.
        diffusion: the process that the base was trained with.
        batches: x0 (B, ...) or (x0, model_kwargs).
        max_batches: how many of them are read.
        seed: seed of timesteps and noise.
        dtype: what the base computes in, as `tdc_fast.nn.inference.denoiser_in` takes it.

    Raises:
        ValueError: there is no batch.
    """
    data = list(islice(batches, max_batches))
    if not data:
        raise invalid("batches", data, "at least one batch of calibration data")
    means, calibration = [], Calibration[Tensor](model, diffusion, denoise=denoiser_in(model, dtype))
    with evaluating(model), torch.no_grad():
        for interval in probes:
            losses = torch.cat([batch.clone() for batch in calibration.of(data, interval, seed=seed)])
            means.append(float(losses.double().mean()))
    return np.array(means)


def in_decibels(losses: np.ndarray) -> np.ndarray:
    """10 log10 of losses, so that differences stand for ratios of losses.

    Raises:
        ValueError: a loss is not finite and above 0.
    """
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise invalid("losses", losses, "finite numbers above 0")
    return 10 * np.log10(losses)


def mean_over_probes(values: np.ndarray, probes: Probes) -> np.ndarray:
    """Mean over each probe of values per timestep: (T,) -> (P,)."""
    return np.array([values[start:stop].mean() for start, stop in probes])
