"""Classifier-free guidance: the prediction for a class, moved away from the prediction for no class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.gaussian import broadcast_to_samples


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
        scale: the guidance scale; 1 leaves the prediction for the class as it is.
        null_class: the label that the model was trained with where it got no class.
    """

    def __init__(self, model: nn.Module, scale: float, null_class: int) -> None:
        super().__init__()
        self.model, self.scale, self.null_class = model, scale, null_class

    @property
    def groups(self) -> Any:
        """The groups of timesteps of a packed model; None of any other."""
        return getattr(self.model, "groups", None)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The guided output for x (B, C, ...), timesteps t (B,) and labels y (B,)."""
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        output, unconditional = self.model(torch.cat([x, x]), torch.cat([t, t]), y=labels).chunk(2)
        return guide(output, unconditional, torch.full_like(y, self.scale - 1, dtype=torch.float32), x.shape[1])
