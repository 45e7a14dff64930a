"""The variational bound on the negative log likelihood, in bits per dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.gaussian import draw_noise, mean_flat
from tdc_fast.diffusion.protocols import Denoiser, prediction_of
from tdc_fast.graphs import graphed

Terms = tuple[Tensor, Tensor, Tensor]
"""Of one step, each (B,): the bound's term, and the squared errors of the predicted x0 and of the predicted noise."""


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


class StepTerms:
    """The terms of single steps, for `bound`. On a GPU they are captured once per shape (`tdc_fast.graphs`).

    Args:
        diffusion: the process.
        model: the denoiser.
        clip_denoised: limit the predicted x0 to [-1, 1].

    Raises:
        ValueError: the denoiser predicts the noise at a timestep at which nothing of x0 is left.
    """

    def __init__(self, diffusion: Diffusion, model: Denoiser, clip_denoised: bool = True) -> None:
        diffusion.check_x0_is_defined("timestep_respacing")
        self.diffusion = diffusion
        self._model, self._clip_denoised = model, clip_denoised
        self._graphed: dict[torch.device, Callable[..., Terms]] = {}

    @torch.no_grad()
    def __call__(self, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: Mapping[str, Any]) -> Terms:
        """The terms of the steps t (B,) of clean samples x0 (B, C, ...) with noise like x0."""
        if x0.device not in self._graphed:
            modules = [self._model] if isinstance(self._model, nn.Module) else []
            self._graphed[x0.device] = graphed(self._terms, x0.device, name="a step of the bound", modules=modules)
        return self._graphed[x0.device](x0, t, noise, dict(model_kwargs))

    def _terms(self, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: dict[str, Any]) -> Terms:
        diffusion = self.diffusion
        x_t = diffusion.q_sample(x0, t, noise)
        output = prediction_of(self._model(x_t, diffusion.original_timesteps(t), **model_kwargs))
        vb = diffusion.vb_terms(output, x0, x_t, t, self._clip_denoised)
        predicted = diffusion.p_mean_variance(output, x_t, t, self._clip_denoised).x0
        error = diffusion.epsilon_from_x0(x_t, t, predicted) - noise
        return vb, mean_flat((predicted - x0) ** 2), mean_flat(error**2)


@torch.no_grad()
def bound(
    terms: StepTerms,
    x0: Tensor,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """The whole bound of clean samples, with one denoiser call per step.

    Args:
        terms: computes the terms of a step with the denoiser; several calls may share it.
        x0: clean samples (B, C, ...).
        model_kwargs: further arguments of the denoiser.
        generator: where the noise comes from; None for torch's default generator.
    """
    diffusion, steps = terms.diffusion, []
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((x0.shape[0],), step, device=x0.device, dtype=torch.int64)
        steps.append(terms(x0, t, draw_noise(x0, generator), model_kwargs or {}))
    vb, xstart_mse, mse = (torch.stack(values, dim=1) for values in zip(*steps, strict=True))
    prior = diffusion.prior_bpd(x0)
    return Bound(total=vb.sum(dim=1) + prior, prior=prior, vb=vb, xstart_mse=xstart_mse, mse=mse)
