"""The variational bound on the negative log likelihood, in bits per dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.gaussian import draw_noise, mean_flat
from tdc_fast.diffusion.protocols import Denoiser


@dataclass(frozen=True)
class Bound:
    """The bound of B samples and its terms per step; steps run from T - 1 down to 0 along the last axis.

    Attributes:
        total: the bound, prior plus the sum of vb, in bits per dimension (B,).
        prior: the term of the prior, in bits per dimension (B,).
        vb: the terms of the steps, in bits per dimension (B, T).
        xstart_mse: mean squared error of the predicted x0 (B, T).
        mse: mean squared error of the predicted noise (B, T).
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor


@torch.no_grad()
def bound(
    diffusion: Diffusion,
    model: Denoiser,
    x0: Tensor,
    *,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """The whole bound of clean samples, with one denoiser call per step.

    Args:
        diffusion: the process.
        model: the denoiser.
        x0: clean samples (B, C, ...).
        clip_denoised: limit the predicted x0 to [-1, 1].
        model_kwargs: further arguments of the model.
        generator: where the noise comes from; None for torch's default generator.
    """
    vb, xstart_mse, mse = [], [], []
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((x0.shape[0],), step, device=x0.device, dtype=torch.int64)
        noise = draw_noise(x0, generator)
        x_t = diffusion.q_sample(x0, t, noise)
        output = model(x_t, diffusion.original_timesteps(t), **(model_kwargs or {}))
        vb.append(diffusion.vb_terms(output, x0, x_t, t, clip_denoised))
        predicted = diffusion.p_mean_variance(output, x_t, t, clip_denoised).x0
        xstart_mse.append(mean_flat((predicted - x0) ** 2))
        mse.append(mean_flat((diffusion.epsilon_from_x0(x_t, t, predicted) - noise) ** 2))
    terms = torch.stack(vb, dim=1)
    prior = diffusion.prior_bpd(x0)
    return Bound(
        total=terms.sum(dim=1) + prior,
        prior=prior,
        vb=terms,
        xstart_mse=torch.stack(xstart_mse, dim=1),
        mse=torch.stack(mse, dim=1),
    )
