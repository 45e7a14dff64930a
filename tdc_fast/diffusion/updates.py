"""One step of any sampler as a weighted sum of what it is made from, so that one batch can mix samplers.

DDPM, DDIM and DPM-Solver++(2M) all take a sample x_t to

    w_x x_t + w_x0 x0 + w_last last_x0 + w_noise noise

with x0 the prediction at x_t and last_x0 that of the step before. The weights depend on the sampler and on its steps
alone: they are computed in float64, for any number of samples or steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.gaussian import arithmetic_dtype, interpolated_log_variance
from tdc_fast.errors import invalid


class StepWeights(NamedTuple):
    """What one step multiplies each of its parts by; float64 (B,) each, or (S,) for S steps.

    Attributes:
        x: weight of x_t.
        x0: weight of the predicted x0.
        last_x0: weight of the x0 that the step before predicted.
        noise: weight of the noise; where the variance is learned, multiplied by the deviation between the next two.
        lowest: log variance where the learned value is -1; 0 with `highest` 0 where the variance is not learned.
        highest: log variance where the learned value is 1.
        x_in_x0: factor of x_t in x0, where the denoiser predicts the noise or v.
        output_in_x0: factor of its prediction there, subtracted.
    """

    x: Tensor
    x0: Tensor
    last_x0: Tensor
    noise: Tensor
    lowest: Tensor
    highest: Tensor
    x_in_x0: Tensor
    output_in_x0: Tensor


def ddpm_weights(diffusion: Diffusion, t: Tensor) -> StepWeights:
    """The ancestral step from t to t - 1 (Ho et al. 2020, algorithm 2); t int64 (B,), not below 0."""
    zero = torch.zeros(t.shape, dtype=torch.float64, device=t.device)
    is_noisy = (t > 0).to(torch.float64)
    lowest = highest = zero
    if diffusion.learns_variance:
        lowest, highest = diffusion.table("posterior_log_variance_clipped", t), diffusion.table("log_betas", t)
    else:
        large = diffusion.variance == "fixed_large"
        name = "large_log_variance" if large else "posterior_log_variance_clipped"
        is_noisy = is_noisy * torch.exp(0.5 * diffusion.table(name, t))
    x, x0 = diffusion.table("posterior_mean_coef_xt", t), diffusion.table("posterior_mean_coef_x0", t)
    return StepWeights(x, x0, zero, is_noisy, lowest, highest, *_prediction_of_x0(diffusion, t))


def ddim_weights(diffusion: Diffusion, t: Tensor, t_next: Tensor, eta: float) -> StepWeights:
    """The DDIM step from t to t_next (Song et al. 2021, equation 12); int64 (B,), -1 the clean sample."""
    now = diffusion.table("alphas_cumprod_from_clean", t + 1)
    after = diffusion.table("alphas_cumprod_from_clean", t_next + 1)
    remaining = (1 - now).clamp(min=1e-20)  # a finished sample's alpha_bar is 1: its unused weights stay finite
    variance = (eta**2 * (1 - after) / remaining * (1 - now / after)).clamp(min=0)
    x = ((1 - after - variance).clamp(min=0) / remaining).sqrt()
    zero = torch.zeros_like(x)
    x0 = after.sqrt() - x * now.sqrt()
    return StepWeights(x, x0, zero, variance.sqrt(), zero, zero, *_prediction_of_x0(diffusion, t.clamp(min=0)))


def dpmpp_2m_weights(diffusion: Diffusion, t: Tensor, t_next: Tensor, t_last: Tensor) -> StepWeights:
    """The step of DPM-Solver++(2M) from t to t_next (Lu et al. 2022, algorithm 2); int64 (B,), -1 the clean sample.

    It is of first order without a prediction at an earlier step (t_last above t), and to the clean sample.
    """
    now = diffusion.table("alphas_cumprod_from_clean", t + 1)
    after = diffusion.table("alphas_cumprod_from_clean", t_next + 1)
    before = diffusion.table("alphas_cumprod_from_clean", t_last + 1)
    step = half_log_snr(after) - half_log_snr(now)
    last_step = half_log_snr(now) - half_log_snr(before)
    second_order = (t_last > t) & (t_next >= 0)
    slope = torch.where(second_order, step / (2 * last_step), 0.0)  # 1 / (2 r) with r = last_step / step
    x = ((1 - after) / (1 - now).clamp(min=1e-20)).sqrt()
    gain = -after.sqrt() * torch.expm1(-step)
    zero = torch.zeros_like(x)
    x0 = _prediction_of_x0(diffusion, t.clamp(min=0))
    return StepWeights(x, gain * (1 + slope), -gain * slope, zero, zero, zero, *x0)


def advance(
    diffusion: Diffusion,
    output: Tensor,
    x: Tensor,
    weights: Tensor,
    *,
    noise: Tensor | None = None,
    last_x0: Tensor | None = None,
    clip_denoised: bool = True,
) -> tuple[Tensor, Tensor]:
    """Take every sample one step, given the denoiser's output. A sample's bits do not depend on the others.

    Args:
        diffusion: says what the denoiser predicts.
        output: the denoiser's output (B, C, ...), or (B, 2C, ...) when the variance is learned.
        x: samples x_t (B, C, ...).
        weights: the eight rows of `StepWeights`, (8, B), of any float dtype.
        noise: noise like x; None where no weight of it is above 0.
        last_x0: the x0 of the step before, like x; None where all its weights are 0.
        clip_denoised: limit the predicted x0 to [-1, 1].

    Returns:
        The samples after the step, and the predicted x0, each like x.

    Raises:
        ValueError: the output does not have the shape that the process requires, or noise or last_x0 not that of x.
    """
    for name, value in (("noise", noise), ("last_x0", last_x0)):
        if value is not None and value.shape != x.shape:
            raise invalid(name, f"shape {tuple(value.shape)}", f"the shape of x, {tuple(x.shape)}")
    prediction, values = diffusion.split_output(output, x)
    x = x.to(arithmetic_dtype(x))
    w = StepWeights(*weights.to(x.dtype).view(len(weights), -1, *([1] * (x.dim() - 1))).unbind())
    # What is made from x has its strides, which are part of a graph's signature; hence the sums in place.
    if diffusion.prediction == "x0":
        x0 = torch.empty_like(x).copy_(prediction)
    else:
        x0 = x * w.x_in_x0
        x0 -= prediction * w.output_in_x0
    if clip_denoised:
        x0.clamp_(-1, 1)
    result = x * w.x
    result += x0 * w.x0
    if last_x0 is not None:
        result += last_x0 * w.last_x0
    if noise is not None:
        deviation = w.noise
        if values is not None:
            deviation = deviation * torch.exp(0.5 * interpolated_log_variance(values, w.lowest, w.highest))
        result += noise * deviation
    return result, x0


def half_log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Half log SNR, log(alpha / sigma): the time of DPM-Solver++; infinite for the clean sample."""
    return 0.5 * (torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod))


def _prediction_of_x0(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    if diffusion.prediction == "v":
        return diffusion.table("sqrt_alphas_cumprod", t), diffusion.table("sqrt_one_minus_alphas_cumprod", t)
    return diffusion.table("sqrt_recip_alphas_cumprod", t), diffusion.table("sqrt_recipm1_alphas_cumprod", t)
