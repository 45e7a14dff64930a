"""A loss that also keeps a denoiser near the predictions of a frozen one, its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.gaussian import mean_flat
from tdc_fast.diffusion.protocols import Denoiser, prediction_of


def distilled_losses(
    diffusion: Diffusion,
    model: Denoiser,
    teacher: Denoiser,
    weight: float,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    model_kwargs: Mapping[str, Any],
    teacher_kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Losses per sample as `Diffusion.training_losses` gives them, plus the distance to the teacher's prediction.

    The distance is the mean squared difference of the two predictions at the same x_t, in what the process predicts
    (the noise, x0 or v), as mse is. A learned variance is not part of it.

    Args:
        diffusion: the process.
        model: the denoiser that is trained.
        teacher: a denoiser of the same process; no gradients are recorded for it.
        weight: what the distance counts in "loss".
        x0: clean samples (B, C, ...).
        t: timesteps (B,).
        noise: standard normal noise like x0.
        model_kwargs: further arguments of the model.
        teacher_kwargs: further arguments of the teacher.

    Returns:
        The losses (B,) by name, with "distillation", the distance before it is weighted, and "loss", which holds it.
    """
    x_t, steps = diffusion.q_sample(x0, t, noise), diffusion.original_timesteps(t)
    with torch.no_grad():
        target, _ = diffusion.split_output(prediction_of(teacher(x_t, steps, **teacher_kwargs)), x_t)
    output = prediction_of(model(x_t, steps, **model_kwargs))
    losses = diffusion.losses_of_output(output, x0, x_t, t, noise)
    distance = mean_flat((diffusion.split_output(output, x_t)[0] - target) ** 2)
    return {**losses, "loss": losses["loss"] + weight * distance, "distillation": distance}
