"""Exponential moving averages of a model's weights, several rates at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tdc_fast.training.expert_rows import blocks_of, runs_of_rows


class WeightAverages:
    """`average = rate * average + (1 - rate) * weight` after every step, one average per rate.

    Args:
        model: its parameters are averaged; its buffers are copied.
        rates: as written on the command line, since they are part of file names.
        ramp: use `min(rate, (1 + n) / (10 + n))` at the n-th update (n from 1), so that a short run forgets its
            start.
        lengths: of a routed model, each group's length of averaging, 1 / (1 - rate), as a multiple of that of the
            rates and of the ramp; none for 1 everywhere. Rows that groups share have the mean of theirs.

    Attributes:
        averages: {rate: averages of the parameters}.
    """

    def __init__(
        self, model: nn.Module, rates: Sequence[str], ramp: bool = False, lengths: Sequence[float] = ()
    ) -> None:
        self._model = model
        self._names = [name for name, _ in model.named_parameters()]
        self._weights = [parameter.detach() for parameter in model.parameters()]
        self._ramp = ramp
        self.averages: dict[str, list[Tensor]] = {rate: [weight.clone() for weight in self._weights] for rate in rates}
        self._parts = [part for rate in rates for part in self._parts_of(rate, lengths)]

    def _parts_of(self, rate: str, lengths: Sequence[float]) -> list[tuple[float, float, list[Tensor], list[Tensor]]]:
        """The averages of a rate in parts of one length each: (the part's rate, its length, averages, weights)."""
        averages = self.averages[rate]
        if not lengths:
            return [(float(rate), 1.0, averages, self._weights)]
        of = {id(parameter): average for parameter, average in zip(self._model.parameters(), averages, strict=True)}
        return [
            (
                1.0 - (1.0 - float(rate)) / length,
                length,
                [of[id(parameter)][rows] for parameter, rows in parts],
                [parameter.detach()[rows] for parameter, rows in parts],
            )
            for length, parts in runs_of_rows(blocks_of(self._model), lengths).items()
        ]

    @torch.no_grad()
    def update(self, n: Tensor) -> None:
        """Update the averages with the weights after a step.

        Args:
            n: number of the step, counted from 1: float64, 0-dim, on the device. It is never read back.
        """
        most = (1 + n) / (10 + n)
        for rate, length, averages, weights in self._parts:
            if self._ramp:
                ramp = most if length == 1.0 else (1.0 - (1.0 - most) / length).clamp(min=0.0)
                _move(averages, weights, (1.0 - ramp.clamp(max=rate)).float())
            else:
                torch._foreach_lerp_(averages, weights, 1.0 - rate)

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
