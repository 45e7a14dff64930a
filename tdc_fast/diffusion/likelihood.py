"""The variational bound on the negative log likelihood, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tdc_fast.diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl

if TYPE_CHECKING:
    from tdc_fast.diffusion.diffusion import Denoiser, Diffusion


@dataclass(frozen=True)
class Bound:
    """The bound of B samples and its terms per step; steps run from T - 1 down to 0 along the last axis.

    total (B,) = prior (B,) + sum of vb (B, T), all in bits per dimension; xstart_mse and mse (B, T) are the squared
    errors of the predicted x0 and noise.
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    xstart_mse: Tensor
    mse: Tensor


def vb_terms(
    diffusion: Diffusion, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True
) -> Tensor:
    """The bound's term of each sample's step t (B,), in bits per dimension (B,).

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0; the negative log likelihood of the 8-bit pixels for t = 0
    (Ho et al. 2020, equation 5).
    """
    truth = diffusion.q_posterior(x0, x_t, t)
    step = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    kl = mean_flat(normal_kl(truth.mean, truth.log_variance, step.mean, step.log_variance))
    log_scale = (0.5 * step.log_variance).expand_as(step.mean)
    decoder = -mean_flat(discretized_gaussian_log_likelihood(x0, step.mean, log_scale))
    return torch.where(t == 0, decoder, kl) / math.log(2.0)


def prior_bpd(diffusion: Diffusion, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, 1)) in bits per dimension (B,); no denoiser can change it."""
    last = torch.full((x0.shape[0],), diffusion.num_timesteps - 1, device=x0.device, dtype=torch.int64)
    mean = diffusion.coefficient("sqrt_alphas_cumprod", last, x0) * x0
    log_variance = torch.log(diffusion.coefficient("sqrt_one_minus_alphas_cumprod", last, x0) ** 2)
    zero = torch.zeros_like(mean)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


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
    """The whole bound of x0 (B, C, ...), one denoiser call per step."""
    from tdc_fast.diffusion.samplers import draw_noise

    vb, xstart_mse, mse = [], [], []
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((x0.shape[0],), step, device=x0.device, dtype=torch.int64)
        noise = draw_noise(x0, generator)
        x_t = diffusion.q_sample(x0, t, noise)
        output = model(x_t, diffusion.original_timesteps(t), **(model_kwargs or {}))
        vb.append(vb_terms(diffusion, output, x0, x_t, t, clip_denoised))
        predicted = diffusion.p_mean_variance(output, x_t, t, clip_denoised).x0
        xstart_mse.append(mean_flat((predicted - x0) ** 2))
        mse.append(mean_flat((diffusion.epsilon_from_x0(x_t, t, predicted) - noise) ** 2))
    terms = torch.stack(vb, dim=1)
    prior = prior_bpd(diffusion, x0)
    return Bound(
        total=terms.sum(dim=1) + prior,
        prior=prior,
        vb=terms,
        xstart_mse=torch.stack(xstart_mse, dim=1),
        mse=torch.stack(mse, dim=1),
    )
