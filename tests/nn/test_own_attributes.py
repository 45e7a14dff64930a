"""Attributes by which a module reaches its layers and methods: a packed copy uses its own, not those of the base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, pack_experts
from tests.models.test_iddpm import randomise

GROUPS = TimestepGroups.uniform(100, 4)
T = torch.tensor([90, 10, 60, 99, 0, 12])  # no sample in group 1


class Gated(nn.Module):
    """A parameter that a method reads; `keep` keeps it somewhere.

    Its x (B, 4, 3) also fits the stacked parameter (4, 3), so that a method of another object raises no error.
    """

    def __init__(self, keep: Callable[[Any], None]) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))
        keep(self)

    def scaled(self, x: Tensor, times: float = 1.0) -> Tensor:
        return x * self.gate * times

    def hook(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.scaled(args[0]), args[1]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        kept = getattr(self, "kept", None)
        found = kept["a"] if isinstance(kept, dict) else kept[0] if isinstance(kept, list) else kept
        return x if found is None else found(x)


KEPT: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda m: setattr(m, "kept", m.scaled),
    "a partial function": lambda m: setattr(m, "kept", functools.partial(m.scaled, times=2.0)),
    "a list": lambda m: setattr(m, "kept", [m.scaled]),
    "a dict": lambda m: setattr(m, "kept", {"a": m.scaled}),
    "a hook": lambda m: m.register_forward_pre_hook(m.hook),
}


def gated(where: str, seed: int) -> nn.Module:
    return randomise(Gated(KEPT[where]), seed)


@pytest.mark.parametrize("where", KEPT)
def test_a_method_that_a_module_keeps_reads_the_parameters_of_the_samples_expert(where: str) -> None:
    experts = [gated(where, seed) for seed in range(4)]
    routed, x = pack_experts(experts, GROUPS), torch.randn(6, 4, 3)
    expected = torch.cat([experts[g](x[i, None], T[i, None]) for i, g in enumerate(GROUPS.group_of(T))])
    torch.testing.assert_close(routed(x, T), expected)
    torch.testing.assert_close(routed.expert(2)(x, T), experts[2](x, T))


class Named(nn.Module):
    """Has an attribute by the name of what routed layers keep their plan in."""

    def __init__(self, routing: Any) -> None:
        super().__init__()
        self.dense, self.routing = nn.Linear(3, 3), routing

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.dense(x)
        return self.routing(y) if isinstance(self.routing, nn.Module) else y if self.routing is None else -y


@pytest.mark.parametrize("routing", ["top", None, nn.Linear(3, 3)], ids=str)
def test_a_module_may_have_an_attribute_named_routing(routing: Any) -> None:
    base, x = Named(routing), torch.randn(6, 3)
    routed = pack_experts(base, GROUPS)
    torch.testing.assert_close(routed(x, T), base(x, T))
    torch.testing.assert_close(routed.expert(1)(x, T), base(x, T))
    if not isinstance(routing, nn.Module):
        assert routed.model.routing == routed.expert(1).routing == routing


class Closed(nn.Module):
    """Keeps a function that computes with a layer of the module."""

    def __init__(self, make: Callable[[nn.Linear], Any], as_hook: bool = False) -> None:
        super().__init__()
        self.dense, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        if as_hook:
            self.dense.register_forward_hook(make(self.other))
        else:
            self.function = make(self.other)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.dense(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Closed(lambda layer: lambda x: layer(x)), "0.function: got 'a function that holds a Linear'"),
        (lambda: Closed(lambda layer: lambda x, f=layer: f(x)), "0.function: got 'a function that holds a Linear'"),
        (
            lambda: Closed(lambda layer: lambda m, args, y: y + layer(args[0]), as_hook=True),
            r"0.dense._forward_hooks\[\d+\]: got 'a function that holds a Linear'; expected a method",
        ),
    ],
)
def test_a_function_that_would_use_the_weights_of_the_base_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_experts(nn.Sequential(model()), GROUPS)


def test_a_function_that_holds_no_weights_is_copied_as_it_is() -> None:
    act, base = nn.SiLU(), Closed(lambda layer: None)
    base.act, base.function = act, lambda x: act(x)
    x = torch.randn(6, 3)
    torch.testing.assert_close(pack_experts(base, GROUPS)(x, T), base(x, T))


def test_other_tensors_take_the_places_of_parameters_for_a_call() -> None:
    routed, x = pack_experts(gated("an attribute", 0), GROUPS), torch.randn(6, 4, 3)
    given = {name: 2 * parameter.detach() for name, parameter in routed.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(routed, given, (x, T)), 2 * routed(x, T))
