"""Samplers: DDPM ancestral, DDIM and DPM-Solver++(2M), every one at a timestep per sample.

A step takes x (B, C, ...) and t (B,): sample b is x at step t[b]. Samples of one batch may be at different steps and go
to different next steps. A sample with t = -1 is finished and is returned unchanged, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tdc_fast.diffusion.diffusion import Diffusion, check_timesteps
from tdc_fast.diffusion.gaussian import draw_noise
from tdc_fast.diffusion.protocols import Denoiser, prediction_of
from tdc_fast.diffusion.respacing import spaced_timesteps
from tdc_fast.diffusion.updates import advance, ddim_weights, ddpm_weights, dpmpp_2m_weights, half_log_snr
from tdc_fast.errors import integer, invalid

SamplerName = Literal["ddpm", "ddim", "dpm++2m"]
SpacingName = Literal["auto", "leading", "trailing", "linspace"]
FINISHED = -1
LOWEST_LOG_SNR = -5.1
"""Half log SNR below which DPM-Solver++ does not start: at the end of the cosine schedule nothing of x0 is left in x_t,
and a second-order step would extrapolate from a prediction made there."""


@torch.no_grad()
def ddpm_step(
    diffusion: Diffusion,
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """One ancestral step x_t -> x_{t-1} (Ho et al. 2020, algorithm 2); t = 0 returns the mean, without noise.

    Args:
        diffusion: the process.
        model: the denoiser.
        x: samples (B, C, ...).
        t: step of each sample (B,), -1 for a finished one.
        noise: noise like x; drawn when None.
        generator: where drawn noise comes from; None for torch's default generator.
        clip_denoised: limit the predicted x0 to [-1, 1].
        model_kwargs: further arguments of the model.
    """
    output = _predict(diffusion, model, x, t, model_kwargs)
    noise = draw_noise(x, generator) if noise is None else noise
    weights = torch.stack(ddpm_weights(diffusion, t.clamp(min=0)))
    result, _ = advance(diffusion, output, x, weights, noise=noise, clip_denoised=clip_denoised)
    return _keep_finished(result, x, t)


@torch.no_grad()
def ddim_step(
    diffusion: Diffusion,
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    t_next: Tensor | None = None,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """One DDIM step x_t -> x_{t_next} (Song et al. 2021, equation 12).

    Args:
        diffusion: the process.
        model: the denoiser.
        x: samples (B, C, ...).
        t: step of each sample (B,), -1 for a finished one.
        t_next: the step to go to (B,), any earlier one, -1 being the clean sample; None takes t - 1.
        eta: 0 is deterministic and draws no noise; 1 has the variance of `fixed_small`.
        noise: noise like x; drawn when None.
        generator: where drawn noise comes from; None for torch's default generator.
        clip_denoised: limit the predicted x0 to [-1, 1].
        model_kwargs: further arguments of the model.

    Raises:
        ValueError: for wrong timesteps, or an eta that is not a finite number from 0 on.
    """
    check_eta(eta)
    t_next = _next_steps(t, t_next)
    output = _predict(diffusion, model, x, t, model_kwargs)
    if eta > 0 and noise is None:
        noise = draw_noise(x, generator)
    weights = torch.stack(ddim_weights(diffusion, t, t_next, eta))
    result, _ = advance(diffusion, output, x, weights, noise=noise if eta > 0 else None, clip_denoised=clip_denoised)
    return _keep_finished(result, x, t)


@dataclass(frozen=True)
class Dpm2mHistory:
    """What DPM-Solver++(2M) remembers of each sample.

    Attributes:
        x0: its last predicted x0 (B, C, ...).
        t: the step (B,) of that prediction, -1 where there is none yet.
    """

    x0: Tensor
    t: Tensor

    @classmethod
    def empty(cls, x: Tensor) -> Dpm2mHistory:
        """The history of samples x (B, C, ...) before their first step."""
        return cls(torch.zeros_like(x), torch.full((x.shape[0],), FINISHED, device=x.device, dtype=torch.int64))

    def select(self, index: Tensor) -> Dpm2mHistory:
        """The history of the samples x[index], for a batch that samples join and leave."""
        return Dpm2mHistory(self.x0[index], self.t[index])

    @staticmethod
    def concat(histories: Sequence[Dpm2mHistory]) -> Dpm2mHistory:
        """The history of concatenated batches."""
        return Dpm2mHistory(torch.cat([h.x0 for h in histories]), torch.cat([h.t for h in histories]))


@torch.no_grad()
def dpmpp_2m_step(
    diffusion: Diffusion,
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    t_next: Tensor | None = None,
    *,
    history: Dpm2mHistory | None = None,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Dpm2mHistory]:
    """One step of DPM-Solver++(2M) x_t -> x_{t_next} (Lu et al. 2022, algorithm 2).

    The step is of first order for a sample without history (its first step), and to the clean sample (t_next = -1),
    where it returns the predicted x0.

    Args:
        diffusion: the process.
        model: the denoiser.
        x: samples (B, C, ...).
        t: step of each sample (B,), -1 for a finished one.
        t_next: the step to go to (B,); None takes t - 1.
        history: what the last call returned; None at the first.
        clip_denoised: limit the predicted x0 to [-1, 1].
        model_kwargs: further arguments of the model.

    Returns:
        The samples, and the history for the next step.

    Raises:
        ValueError: for wrong timesteps.
    """
    t_next = _next_steps(t, t_next)
    history = Dpm2mHistory.empty(x) if history is None else history
    output = _predict(diffusion, model, x, t, model_kwargs)
    weights = torch.stack(dpmpp_2m_weights(diffusion, t, t_next, history.t))
    result, x0 = advance(diffusion, output, x, weights, last_x0=history.x0, clip_denoised=clip_denoised)
    result = _keep_finished(result, x, t)
    return result, Dpm2mHistory(_keep_finished(x0, history.x0, t), torch.where(t < 0, history.t, t))


def check_eta(eta: float) -> None:
    """ValueError unless the noise of DDIM is a finite number from 0 on."""
    if not isinstance(eta, Real) or not 0 <= float(eta) < math.inf:
        raise invalid("eta", eta, "0 (deterministic) or a finite number above it")


def sampling_steps(
    diffusion: Diffusion, sampler: SamplerName, steps: int | None = None, spacing: SpacingName = "auto"
) -> tuple[int, ...]:
    """The increasing steps of `diffusion` that `sample` visits.

    Args:
        diffusion: the process.
        sampler: "ddpm" spreads the steps evenly with both ends, as the spacing "25". "ddim" takes multiples of
            T / steps, starting at 0, for any count; where it divides T, as the spacing "ddim25". "dpm++2m" spreads them
            evenly in half log SNR, which is the time of that solver, from step 0 to the last step above -5.1.
        steps: how many; None for all of them ("dpm++2m": all above -5.1).
        spacing: "auto" is what the sampler does, as above. The others are those of diffusers' DDIM and DDPM schedulers,
            step by step: "leading" takes multiples of T // steps, starting at 0; "trailing" counts T / steps down from
            T - 1, rounded, so that sampling begins at pure noise; "linspace" spreads the steps evenly with both ends.

    Raises:
        ValueError: for an unknown sampler or spacing, or more steps than the process has.
    """
    if sampler not in get_args(SamplerName):
        raise invalid("sampler", sampler, "one of " + ", ".join(get_args(SamplerName)))
    if spacing not in get_args(SpacingName):
        raise invalid("spacing", spacing, "one of " + ", ".join(get_args(SpacingName)))
    total = diffusion.num_timesteps
    if steps is not None:
        steps = integer("steps", steps, 1, total)
    if sampler == "dpm++2m" and spacing == "auto":
        return _even_in_log_snr(diffusion, steps)
    if steps is None:
        return tuple(range(total))
    if spacing == "auto" and sampler == "ddim":
        return tuple(index * total // steps for index in range(steps))
    if spacing == "leading":
        return tuple(index * (total // steps) for index in range(steps))
    if spacing == "auto":
        return spaced_timesteps(total, steps)
    if spacing == "trailing":  # diffusers' arithmetic, halves included; it may give one entry too many, for step -1
        return tuple(int(t) - 1 for t in np.arange(total, 0, -total / steps).round()[:steps][::-1])
    return tuple(int(t) for t in np.linspace(0, total - 1, steps).round())


def _even_in_log_snr(diffusion: Diffusion, steps: int | None) -> tuple[int, ...]:
    falling = half_log_snr(torch.from_numpy(diffusion.alphas_cumprod)).numpy()  # (T,)
    usable = max(1, int((falling >= LOWEST_LOG_SNR).sum()))
    if steps is None or steps >= usable:  # all of them, and further ones only as asked; the last may have alpha_bar 0
        return tuple(range(steps or usable))
    if steps == 1:
        return (usable - 1,)
    targets = np.linspace(falling[0], falling[usable - 1], steps)
    nearest = np.interp(-targets, -falling, np.arange(diffusion.num_timesteps)).round().astype(int)
    # Where targets are closer together than timesteps, take neighbours: each index once, none past the last.
    rank = np.arange(steps)
    distinct = np.maximum.accumulate(nearest - rank) + rank
    return tuple(int(t) for t in np.minimum(distinct, usable - 1 - rank[::-1]))


def _predict(
    diffusion: Diffusion, model: Denoiser, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
) -> Tensor:
    """The denoiser's output; a finished sample's is that at step 0.

    To leave finished samples out would change the batch's shape and wait for the device.
    """
    check_timesteps(t, x, diffusion.num_timesteps, lowest=FINISHED)
    diffusion.check_groups(model)
    return prediction_of(model(x, diffusion.original_timesteps(t.clamp(min=0)), **(model_kwargs or {})))


def _keep_finished(result: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return torch.where((t < 0).view(-1, *([1] * (x.dim() - 1))), x, result)


def _next_steps(t: Tensor, t_next: Tensor | None) -> Tensor:
    if t_next is None:
        return (t - 1).clamp(min=FINISHED)
    if t_next.shape != t.shape:
        raise invalid("t_next", f"shape {tuple(t_next.shape)}", f"one next step per sample, shape {tuple(t.shape)}")
    if t.device.type == "cpu" and bool((((t_next >= t) & (t >= 0)) | (t_next < FINISHED)).any()):
        raise invalid("t_next", t_next.tolist(), f"earlier timesteps than {t.tolist()}, or -1")
    return torch.where(t < 0, t, t_next)
