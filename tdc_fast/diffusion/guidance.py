"""Classifier-free guidance: the prediction for a class, moved away from the prediction for no class."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.gaussian import broadcast_to_samples
from tdc_fast.errors import invalid
from tdc_fast.routing import TimestepGroups


def guide(output: Tensor, unconditional: Tensor, weight: Tensor, channels: int) -> Tensor:
    """Move the predicted noise or image away from that for no class; a learned variance is left alone.

    The result is output + weight * (output - unconditional).

    Source: Ho and Salimans 2022, "Classifier-free diffusion guidance", equation 6, whose w is this weight.

    Args:
        output: the denoiser's output for the classes, (B, C, ...) or (B, 2C, ...).
        unconditional: its output for no class, likewise. Where it is `output` itself, the result is too, bit for bit.
        weight: the guidance scale less 1 for each sample, (B,).
        channels: C.
    """
    difference = output[:, :channels] - unconditional[:, :channels]
    moved = output[:, :channels] + difference * broadcast_to_samples(weight, difference)
    return moved if output.shape[1] == channels else torch.cat([moved, output[:, channels:]], dim=1)


class GuidedDenoiser(nn.Module):
    """A class-conditional denoiser with guidance; the two predictions are one batch of twice the size.

    Args:
        model: called as model(x, t, y=labels).
        scale: the guidance scale, or one for each group of timesteps; 1 leaves the prediction for the class as it is.
        null_class: the label that the model was trained with where it got no class.
        groups: the groups that several scales are for; None takes those of a packed model.

    Raises:
        ValueError: the number of scales is not that of the groups.
    """

    weights: Tensor

    def __init__(
        self,
        model: nn.Module,
        scale: float | Sequence[float],
        null_class: int,
        groups: TimestepGroups | None = None,
    ) -> None:
        super().__init__()
        self.model, self.null_class = model, null_class
        self.scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
        groups = groups or getattr(model, "groups", None)
        check_scales(scale, groups)
        self._scaled_groups = groups if len(self.scales) > 1 else None
        device = next((parameter.device for parameter in model.parameters()), None)
        weights = torch.tensor([one - 1 for one in self.scales], dtype=torch.float32, device=device)
        self.register_buffer("weights", weights, persistent=False)

    @property
    def groups(self) -> Any:
        """The groups of timesteps of a packed model; None of any other."""
        return getattr(self.model, "groups", None)

    def guides(self, timestep: int) -> bool:
        """Whether the prediction for no class is needed at an original timestep, as the scale there is not 1."""
        groups = self._scaled_groups
        return self.scales[0 if groups is None else bisect.bisect_right(groups.boundaries, timestep) - 1] != 1

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, guided: bool = True) -> Tensor:
        """The guided output.

        Args:
            x: noisy samples (B, C, ...).
            t: original timesteps, int64 (B,).
            y: labels (B,).
            guided: False leaves out the second half of the batch, where all scales are 1 (see `guides`).
        """
        if not guided:
            return self.model(x, t, y=y)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        output, unconditional = self.model(torch.cat([x, x]), torch.cat([t, t]), y=labels).chunk(2)
        groups = self._scaled_groups
        weight = self.weights.expand(len(x)) if groups is None else self.weights[groups.group_of(t)]
        return guide(output, unconditional, weight, x.shape[1])


def check_scales(scale: float | Sequence[float], groups: TimestepGroups | None) -> None:
    """Refuse a list of guidance scales that does not fit the groups.

    Args:
        scale: a number, or a number for each group.
        groups: the groups; None without.

    Raises:
        ValueError: naming how many there should be.
    """
    if not isinstance(scale, Sequence) or len(scale) == 1:
        return
    if groups is None or groups.num_groups == 1:
        raise invalid("guidance_scale", scale, "one number, as there are no groups of timesteps")
    if len(scale) != groups.num_groups:
        remedy = f"one number, or {groups.num_groups} of them: one per group from low to high timesteps"
        raise invalid("guidance_scale", scale, remedy)
