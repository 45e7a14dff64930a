"""What the code around a diffusion process asks of a denoiser, and of the process that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Denoiser(Protocol):
    """Predicts noise or the clean image; any ``nn.Module`` or function with this call signature."""

    def __call__(self, x: Tensor, t: Tensor, /, **model_kwargs: Any) -> Tensor:
        """Return (B, C, ...), or (B, 2C, ...) where the variance is learned.

        Args:
            x: noisy images, (B, C, ...).
            t: original timesteps, int64 (B,).
            **model_kwargs: conditions, such as labels ``y`` (B,).
        """


class DiffusionProcess(Protocol):
    """The part of :class:`~tdc_fast.diffusion.diffusion.Diffusion` that grouping and pruning use."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""

    def snr_db(self) -> np.ndarray:
        """Return the signal-to-noise ratio of every timestep in decibels, float64 (T,)."""

    def training_losses(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses per sample (B,) by name; "loss" is the one that training minimizes."""
