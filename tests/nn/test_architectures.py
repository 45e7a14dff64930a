"""Experts that differ in more than the values of their parameters are refused, not packed as if they did not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tdc_fast import TimestepGroups, pack_experts


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.activation: Any = torch.relu
        self.scales = [1.0, 2.0]
        self.mean, self.frozen = torch.zeros(4, 1, 1), [nn.Conv2d(4, 4, 1)]  # no buffer, no submodule
        self.same = (self.conv, self.frozen)
        self.register_buffer("table", torch.ones(4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.activation(self.conv(self.norm(x))) * self.table * self.scales[1]


def changed(change: Callable[[Denoiser], object]) -> list[nn.Module]:
    first = Denoiser()
    second = copy.deepcopy(first)
    change(second)
    return [first, second]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m.norm, "eps", 1e-3), "experts[1].norm.eps: got 0.001; expected 1e-05"),
        (lambda m: setattr(m, "activation", torch.sigmoid), "experts[1].activation: got <built-in method sigmoid"),
        (lambda m: setattr(m, "scales", [1.0, 3.0]), "experts[1].scales: got [1.0, 3.0]; expected [1.0, 2.0]"),
        (lambda m: setattr(m, "table", torch.zeros(4, 1, 1)), "experts[1].table: got 'another buffer'"),
        (
            lambda m: setattr(m, "mean", m.mean + 1),
            "experts[1].mean: got 'another tensor'; expected what experts[0] has",
        ),
        (lambda m: nn.init.ones_(m.frozen[0].weight), "experts[1].frozen[0].weight: got 'a layer with other weights"),
        (lambda m: setattr(m, "conv", nn.Conv2d(4, 4, 1)), "experts[1].conv.kernel_size: got (1, 1); expected (3, 3)"),
        (lambda m: setattr(m, "conv", nn.Identity()), "experts[1]: got 'conv.bias'"),
        (lambda m: setattr(m, "extra", nn.ReLU()), "experts[1]: got 'extra'"),
        (lambda m: setattr(m, "offset", 1), "experts[1].offset: got 1; expected 'missing'"),
    ],
)
def test_the_first_difference_is_named(change: Callable[[Denoiser], object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        pack_experts(changed(change), TimestepGroups.uniform(1000, 2))


def test_parameters_modes_and_hooks_may_differ() -> None:
    def change(model: Denoiser) -> None:
        nn.init.ones_(model.conv.weight)
        model.eval().register_forward_hook(lambda *_: None)
        model.conv.requires_grad_(False)

    experts = changed(change)
    x, t = torch.randn(2, 4, 3, 3), torch.tensor([0, 999])
    out = pack_experts(experts, TimestepGroups.uniform(1000, 2))(x, t)
    torch.testing.assert_close(out, torch.cat([experts[i](x[i : i + 1], t[i]) for i in (0, 1)]))
