"""What a diffusion process needs of a denoiser, and what other packages need of the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tdc_fast.errors import invalid


class Denoiser(Protocol):
    """Predicts noise or the clean image; any `nn.Module` or function with this call signature."""

    def __call__(self, x: Tensor, t: Tensor, /, **model_kwargs: Any) -> Tensor:
        """The prediction (B, C, ...), or (B, 2C, ...) when the variance is learned.

        Args:
            x: noisy images, (B, C, ...).
            t: original timesteps, int64 (B,).
            **model_kwargs: conditions, such as labels `y` (B,).
        """


def prediction_of(output: Any) -> Tensor:
    """What a denoiser returned as a tensor: the tensor itself, or `.sample` of an output of diffusers."""
    if isinstance(output, Tensor):
        return output
    sample = getattr(output, "sample", None)
    if not isinstance(sample, Tensor):
        raise invalid("model", type(output).__name__, "a model that returns a tensor, or an output with .sample")
    return sample


class DiffusionProcess(Protocol):
    """The part of `Diffusion` that grouping, pruning and evaluation use."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""

    def snr_db(self) -> np.ndarray:
        """Signal-to-noise ratio of every timestep in decibels, float64 (T,)."""

    def training_losses(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Losses per sample (B,) by name; training minimizes "loss"."""
