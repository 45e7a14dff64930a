"""Exponential moving averages of a model's weights, several rates at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class WeightAverages:
    """`average = rate * average + (1 - rate) * weight` after every step, one average per rate.

    Args:
        model: its parameters are averaged; its buffers are copied.
        rates: as written on the command line, since they are part of file names.
        ramp: use `min(rate, (1 + n) / (10 + n))` at the n-th update (n from 1), so that a short run forgets its
            start.

    Attributes:
        averages: {rate: averages of the parameters}.
    """

    def __init__(self, model: nn.Module, rates: Sequence[str], ramp: bool = False) -> None:
        self._model = model
        self._names = [name for name, _ in model.named_parameters()]
        self._weights = [parameter.detach() for parameter in model.parameters()]
        self._ramp = ramp
        self.averages: dict[str, list[Tensor]] = {rate: [weight.clone() for weight in self._weights] for rate in rates}

    @torch.no_grad()
    def update(self, n: Tensor) -> None:
        """Update the averages with the weights after a step.

        Args:
            n: number of the step, counted from 1: float64, 0-dim, on the device. It is never read back.
        """
        for rate, average in self.averages.items():
            if self._ramp:
                share = (1.0 - ((1 + n) / (10 + n)).clamp(max=float(rate))).float()
                _move(average, self._weights, share)
            else:
                torch._foreach_lerp_(average, self._weights, 1.0 - float(rate))

    def state_dict(self, rate: str) -> dict[str, Tensor]:
        """The model's state dict with one rate's averages in place of the parameters, fp32; it shares their memory."""
        state = dict(self._model.state_dict())
        for name, average in zip(self._names, self.averages[rate], strict=True):
            state[name] = average
        return state

    def load_state_dict(self, rate: str, state: Mapping[str, Tensor]) -> None:
        """Take one rate's averages from a state dict of the model."""
        for name, average in zip(self._names, self.averages[rate], strict=True):
            average.copy_(state[name])


def _move(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """Add to every average `share` of its distance to the weight; share: fp32, 0-dim, on their device."""
    if not _launches_cost(share.device):
        torch._foreach_lerp_(averages, weights, [share] * len(averages))
        return
    # On a GPU a lerp by a tensor is a launch per parameter; a step of torch's fused SGD takes few for all of them. With
    # weight decay 1, going up along w, it is average -= share * (average - w). The weights are only read.
    torch._fused_sgd_(
        averages, weights, [], weight_decay=1.0, momentum=0.0, lr=share, dampening=0.0, nesterov=False, maximize=True,
        is_first_step=False,
    )  # fmt: skip


def _launches_cost(device: torch.device) -> bool:
    return device.type == "cuda"
