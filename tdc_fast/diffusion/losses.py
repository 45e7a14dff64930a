"""Training losses of the denoiser and the Gaussian terms they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tdc_fast.diffusion.diffusion import Denoiser, Diffusion

PIXEL_HALF_WIDTH = 1 / 255
"""Half the distance between two 8-bit pixel values scaled to [-1, 1]."""
MIN_PROBABILITY = 1e-12


def training_losses(
    diffusion: Diffusion,
    model: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Losses per sample for clean x0 (B, C, ...) noised to steps t (B,); differentiable in the model's parameters.

    Returns 'loss' (B,), and for the mse losses 'mse' (B,) and, when the variance is learned, 'vb' (B,):

    - mse, rescaled_mse: mean squared error of the predicted noise (or x0). With a learned variance the hybrid loss
      mse + vb (Nichol and Dhariwal 2021, section 3.1): the bound then trains the variance only, its mean being
      detached. rescaled_mse multiplies vb by T / 1000.
    - kl, rescaled_kl: the bound's term in bits per dimension; rescaled_kl multiplies it by T, which estimates the
      whole bound.
    """
    from tdc_fast.diffusion.likelihood import vb_terms

    if noise is None:
        noise = torch.randn_like(x0)
    x_t = diffusion.q_sample(x0, t, noise)
    output = model(x_t, diffusion.original_timesteps(t), **(model_kwargs or {}))
    if diffusion.loss in ("kl", "rescaled_kl"):
        loss = vb_terms(diffusion, output, x0, x_t, t, clip_denoised=False)
        return {"loss": loss * diffusion.num_timesteps if diffusion.loss == "rescaled_kl" else loss}

    prediction, values = diffusion.split_output(output, x_t)
    target = noise if diffusion.prediction == "epsilon" else x0
    mse = mean_flat((target - prediction) ** 2)
    if values is None:
        return {"loss": mse, "mse": mse}
    frozen_mean = torch.cat([prediction.detach(), values], dim=1)
    vb = vb_terms(diffusion, frozen_mean, x0, x_t, t, clip_denoised=False)
    if diffusion.loss == "rescaled_mse":
        # Against the bound's own T-fold estimate this divides by 1000: vb must not drown mse.
        vb = vb * (diffusion.num_timesteps / 1000.0)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the first dimension: (B, ...) -> (B,)."""
    return x.mean(dim=tuple(range(1, x.dim())))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) elementwise, in nats."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats and elementwise, that N(mean, exp(log_scale)**2) rounds to the 8-bit pixel x in [-1, 1].

    The two end pixels take the whole tail beyond them (Ho et al. 2020, equation 13). The normal's distribution function
    is the tanh approximation of Page (1977), whose error is below 3e-4, as in the published IDDPM numbers.
    """
    centered = x - mean
    inverse_scale = torch.exp(-log_scale)
    below_upper = _normal_cdf(inverse_scale * (centered + PIXEL_HALF_WIDTH))
    below_lower = _normal_cdf(inverse_scale * (centered - PIXEL_HALF_WIDTH))

    def log(probability: Tensor) -> Tensor:
        return torch.log(probability.clamp(min=MIN_PROBABILITY))

    inside_or_top = torch.where(x > 0.999, log(1.0 - below_lower), log(below_upper - below_lower))
    return torch.where(x < -0.999, log(below_upper), inside_or_top)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
