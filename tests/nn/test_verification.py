"""What packing cannot see, and shapes do not show, is found by comparison with the experts, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.nn.verification import check_against_experts
from tests.models.test_iddpm import randomise
from tests.nn.foreign import Transformer
from tests.nn.test_one_expert import unet

GROUPS = TimestepGroups.uniform(100, 4)
T = torch.tensor([90, 10, 60, 99])


class Computes(nn.Module):
    """A denoiser of two layers and what it does between them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.between = forward

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def by_class(m: Any, x: Tensor) -> Tensor:
    return x * 2 if isinstance(m.norm, nn.LayerNorm) else x


MISTAKES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {  # x is (4, 4, 4), so every shape fits
    "samples in another dimension": (lambda m, x: m.norm(x.transpose(0, 1)).transpose(0, 1), "last"),
    "parameters of another layer": (lambda m, x: x + m.norm.bias, "last"),
    "the class of a layer": (by_class, "last"),
    "another order of samples": (lambda m, x: m.norm(x.flip(0)).flip(0), "norm"),
    "statistics of the batch": (lambda m, x: x - x.mean(0), "last"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_module_is_named_at_which_results_begin_to_differ(name: str) -> None:
    forward, path = MISTAKES[name]
    routed = pack_experts([randomise(Computes(forward), seed) for seed in range(4)], GROUPS).train()
    with pytest.raises(ValueError, match=f"module '{path}': got 'a relative difference of .*'; expected a model"):
        check_against_experts(routed, torch.randn(4, 4, 4), T)
    assert routed.training and not any(module._forward_hooks for module in routed.modules())


def test_a_model_that_computes_what_its_experts_do_passes() -> None:
    routed = pack_experts([randomise(Transformer(), seed) for seed in range(4)], GROUPS)
    x, y, scale = torch.randn(4, 2, 8, 8), torch.tensor([1, 0, 2, 1]), torch.rand(4)
    assert 0 <= check_against_experts(routed, x, T, y, extra={"scale": [scale]}) < 1e-5
    assert check_against_experts(routed, x, 10) < 1e-5
    with pytest.raises(ValueError, match="routed: got 'Linear'; expected a RoutedModel"):
        check_against_experts(nn.Linear(3, 3), x, T)


def test_pruned_experts_pass_and_a_difference_in_them_is_found() -> None:
    base = unet()
    routed = pack_experts(base, GROUPS, WidthPlan.uniform(base, GROUPS.boundaries, [1.0, 0.5, 0.0, 0.5]))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 1])
    assert check_against_experts(routed, x, T, y=y) < 1e-4
    routed.model.out[2].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="module 'out.2': got 'a relative difference of 1'; expected a model"):
        check_against_experts(routed, x, T, y)
