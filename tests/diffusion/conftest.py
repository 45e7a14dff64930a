"""A data distribution whose exact denoiser is known: every claim about samplers and losses can be a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tdc_fast.diffusion import Diffusion


@dataclass(frozen=True)
class GaussianData:
    """N(mean, covariance) in D dimensions, float64, and the denoiser that is exact for it under `diffusion`."""

    mean: torch.Tensor  # (D,)
    covariance: torch.Tensor  # (D, D)
    diffusion: Diffusion

    def marginal(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of x_t; t = -1 is the data."""
        alpha_bar = 1.0 if t < 0 else float(self.diffusion.alphas_cumprod[t])
        return alpha_bar**0.5 * self.mean, alpha_bar * self.covariance + (1 - alpha_bar) * self._eye

    def denoiser(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[epsilon | x_t = x], (B, D), for timesteps t (B,)."""
        alpha_bar = torch.from_numpy(self.diffusion.alphas_cumprod)[t].to(x).view(-1, 1)
        _, basis = torch.linalg.eigh(self.covariance.to(x))
        spread = torch.linalg.eigvalsh(self.covariance.to(x))
        centred = (x - alpha_bar.sqrt() * self.mean.to(x)) @ basis
        epsilon = centred * (1 - alpha_bar).sqrt() / (alpha_bar * spread + 1 - alpha_bar)
        return epsilon @ basis.T

    def flow(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x (B, D) at step `start` carried exactly along the probability flow to step `stop`."""
        spread, basis = torch.linalg.eigh(self.covariance)
        (mean_a, _), (mean_b, _) = self.marginal(start), self.marginal(stop)
        now, after = (self._spread(spread, t) for t in (start, stop))
        return mean_b + ((x - mean_a) @ basis * (after / now).sqrt()) @ basis.T

    def _spread(self, spread: torch.Tensor, t: int) -> torch.Tensor:
        alpha_bar = 1.0 if t < 0 else float(self.diffusion.alphas_cumprod[t])
        return alpha_bar * spread + 1 - alpha_bar

    @property
    def _eye(self) -> torch.Tensor:
        return torch.eye(len(self.mean), dtype=torch.float64)


@pytest.fixture
def gaussian_data():
    def make(diffusion: Diffusion, covariance: float | None = None) -> GaussianData:
        mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
        matrix = np.array([[0.20, 0.06], [0.06, 0.05]]) if covariance is None else covariance * np.eye(2)
        return GaussianData(mean, torch.from_numpy(matrix), diffusion)

    return make
