"""Gaussian distributions: noise, divergences and likelihoods, for the process, its losses and its samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PIXEL_HALF_WIDTH = 1 / 255
"""Half the distance between two 8-bit pixel values scaled to [-1, 1]."""
MIN_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over x_{t-1}.

    Attributes:
        mean: its mean; broadcasts against x, as do the others.
        variance: its variance.
        log_variance: the logarithm of the variance, clipped where the variance is zero.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: only the denoiser runs in lower precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def broadcast_to_samples(values: Tensor, x: Tensor) -> Tensor:
    """`values` (B,) as (B, 1, ..., 1) in the arithmetic dtype of x (B, C, ...)."""
    return values.to(arithmetic_dtype(x)).view(-1, *([1] * (x.dim() - 1)))


def draw_noise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise like x, drawn on the generator's own device: a seed gives the same noise on all devices."""
    source = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=source, dtype=arithmetic_dtype(x))
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    noise = noise.to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    if noise.device.type == "cpu" and x.is_cuda:
        noise = noise.pin_memory()  # so that the CPU can draw the next noise while the GPU works
    return noise.to(x.device, non_blocking=True)


def interpolated_log_variance(values: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """The learned log variance: from `lowest` at value -1 to `highest` at 1 (Nichol and Dhariwal 2021, equation 15)."""
    fraction = (values + 1) / 2
    return fraction * highest + (1 - fraction) * lowest


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

    Each of the two end pixels takes the whole tail beyond it (Ho et al. 2020, equation 13). The normal's distribution
    function is the tanh approximation of Page (1977), error below 3e-4, as in the published IDDPM numbers.
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
