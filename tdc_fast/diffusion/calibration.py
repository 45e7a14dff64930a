"""Denoising losses on calibration data, with the same timesteps and noise for every model that is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.protocols import DiffusionProcess

Batch = Tensor | tuple[Tensor, Mapping[str, Any]]


def calibration_losses(
    model: nn.Module, batches: Iterable[Batch], diffusion: DiffusionProcess, group: tuple[int, int], *, seed: int = 0
) -> Iterator[Tensor]:
    """The training loss (B,) of each batch at timesteps of a group, on the model's device.

    Each batch spreads its timesteps evenly over the group. Timesteps and noise depend only on `seed` and the batches'
    shapes, so that groups and models are compared on the same draws.

    Args:
        model: the denoiser.
        batches: clean samples (B, C, ...), each alone or with the model's further arguments.
        diffusion: the process.
        group: timesteps start to stop - 1.
        seed: of timesteps and noise.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for x0, kwargs in map(split_batch, batches):
        t, noise = draw_timesteps(x0, group, generator)
        kwargs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        x0, t, noise = x0.to(device), t.to(device), noise.to(device)
        yield diffusion.training_losses(model, x0, t, noise=noise, model_kwargs=kwargs)["loss"]


def split_batch(batch: Batch) -> tuple[Tensor, Mapping[str, Any]]:
    """Clean samples x0 and model_kwargs of a batch, which is x0 alone or that pair."""
    if isinstance(batch, Tensor):
        return batch, {}
    x0, kwargs = batch
    return x0, kwargs or {}


def draw_timesteps(x0: Tensor, group: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Timesteps spread evenly over a group, and noise.

    Args:
        x0: clean samples (B, C, ...).
        group: timesteps start to stop - 1, of which each of B equal parts gets one draw.
        generator: where random numbers come from.

    Returns:
        Timesteps, int64 (B,), in random order, and noise like x0.
    """
    start, stop = group
    count = x0.shape[0]
    shares = (torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=generator)) / max(count, 1)
    t = start + (shares * (stop - start)).long().clamp_(max=stop - start - 1)
    t = t[torch.randperm(count, generator=generator)]
    return t, torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
