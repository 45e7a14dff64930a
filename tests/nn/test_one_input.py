"""Linear layers of one input give the same in one launch as one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.models.iddpm import UNet
from tdc_fast.nn import layers, one_input
from tdc_fast.nn.leaf import LiveAxis
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.nn.one_input import chunks_in_one_launch
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.plan_scope import PlanScope, Running
from tdc_fast.nn.routed import RoutedLinear
from tdc_fast.nn.twins import routed_twin
from tdc_fast.routing import RoutingPlan
from tests.models.test_iddpm import randomise
from tests.nn.test_packing import GROUPS, PRUNED, batch, shuffled_plan, unet
from tests.operators import Recorded

PLANS = {
    "an expert per group": RoutingPlan.from_groups([2, 0, 2, 1, 0, 2], 4),  # group 3 has no sample
    "groups that share experts": RoutingPlan.from_groups([2, 0, 2, 1, 4, 2], 5, [0, 2, 0, 1, 1]),
    "no samples": RoutingPlan.from_groups([], 2),
}
# Live channels of every expert in a layer of so many channels per copy; None where nothing is pruned.
CUTS: dict[str, list[tuple[int, tuple[int, ...] | None]]] = {
    "one size": [(5, None), (5, None), (5, None)],
    "several sizes": [(5, None), (3, None), (8, None)],
    "pruned": [(5, None), (8, (3, 8, 0, 2)), (6, (6, 6, 6, 6)), (3, (0, 0, 0, 3))],
}


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does."""
    monkeypatch.setattr(one_input, "launches_cost", lambda device: True)


def leaves(cuts: list[tuple[int, tuple[int, ...] | None]], copies: int, experts: int = 4) -> list[RoutedLinear]:
    made = []
    for size, counts in cuts:
        axis = None if counts is None else LiveAxis(counts, copies)
        leaf = routed_twin("emb", layers.Linear(7, size * copies), experts, axis, None)
        assert isinstance(leaf, RoutedLinear)
        made.append(randomise(leaf, seed=size).double())
    return made


def chunks(made: list[Any], x: Tensor, copies: int) -> list[tuple[Tensor, ...]]:
    found = chunks_in_one_launch(made, x, copies)
    return [leaf.chunks(x, copies) for leaf in made] if found is None else found


def results(made: list[RoutedLinear], plan: RoutingPlan, copies: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Outputs; gradients of x and all parameters; MACs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(plan.batch_size, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    scope = PlanScope()
    for leaf in made:
        leaf.routing = scope
    with MacCounter() as counter, scope.using(Running(plan)):
        out = [part for parts in chunks(made, x, copies) for part in parts]
    loss = sum((part * torch.randn(part.shape, generator=generator).double()).sum() for part in out)
    grads = torch.autograd.grad(loss, [x, *(p for leaf in made for p in leaf.parameters())])
    return out, list(grads), counter.macs


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_one_launch_gives_outputs_gradients_and_macs_of_many(
    plan: RoutingPlan, cuts: list[tuple[int, tuple[int, ...] | None]], copies: int, request: pytest.FixtureRequest
) -> None:
    made = leaves(cuts, copies)
    if plan.num_groups == 5:  # widths by group, as pruning's candidates have them
        for leaf, (size, counts) in zip(made, cuts, strict=True):
            leaf.out_widths = None if counts is None else torch.tensor([size, 0, 1, 2, size]).int() * copies
    elif plan.num_groups == 2:
        made = leaves(
            [(size, counts and counts[:2]) for size, counts in cuts if counts is None or any(counts[:2])], copies, 2
        )
    out, grads, macs = results(made, plan, copies)
    request.getfixturevalue("one_launch")
    with Recorded() as called:
        one_out, one_grads, _ = results(made, plan, copies)
    assert called["routed_linear"] == called["routed_linear_dgrad"] == called["routed_linear_wgrad"] == 1
    for ours, right in zip((*one_out, *one_grads), (*out, *grads), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
    assert results(made, plan, copies)[2] == macs


def test_the_chunks_of_one_size_are_contiguous(one_launch: None) -> None:
    """So that the layers that read them copy nothing."""
    made = leaves([(5, None), (5, (3, 5, 0, 2))], 2)
    assert all(part.is_contiguous() for part in results(made, PLANS["an expert per group"], 2)[0])


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_a_packed_unet_embeds_in_one_launch(
    pruned: bool, use_checkpoint: bool, scale_shift: bool, request: pytest.FixtureRequest
) -> None:
    model = unet(use_scale_shift_norm=scale_shift, use_checkpoint=use_checkpoint)
    if pruned:
        routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    else:
        settings = {"use_scale_shift_norm": scale_shift, "use_checkpoint": use_checkpoint}
        routed = pack_experts([unet(seed, **settings) for seed in range(3)], GROUPS)
    blocks = sum(unit.kind == "resblock" for unit in model.pruning_units())

    def run() -> tuple[list[Tensor], int, int]:
        x, t, y = batch()
        routed.zero_grad()
        with Recorded() as called:
            out = routed(x, t, y=y)
        out.square().sum().backward()
        macs = measure_macs(routed, x, t, y=y)
        return [out, *(parameter.grad for parameter in routed.parameters())], called["routed_linear"], macs

    expected, launches, macs = run()
    request.getfixturevalue("one_launch")
    actual, fewer, same_macs = run()
    assert fewer == launches - blocks + 1 and same_macs == macs
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_a_hook_sees_what_the_dense_layer_gives(pruned: bool, one_launch: None) -> None:
    model = unet(use_scale_shift_norm=True)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED) if pruned else None)
    x, t, y = batch()
    t = torch.full_like(t, 999)  # all of the last expert
    expected, expert = routed(x, t, y=y), routed.expert(2)
    name = next(name for name, _ in expert.named_modules() if name.endswith("emb_layers.1"))
    seen: list[Tensor] = []
    for layer in (routed.model.get_submodule(name), expert.get_submodule(name)):
        layer.register_forward_hook(lambda module, given, result: seen.append(result.detach()))
    torch.testing.assert_close(routed(x, t, y=y), expected, rtol=1e-4, atol=1e-4)
    expert(x, t, y=y)
    ours, theirs = (value.unflatten(-1, (2, -1)) for value in seen)  # scales, then shifts
    width = theirs.shape[-1]
    torch.testing.assert_close(ours[..., :width], theirs, rtol=1e-4, atol=1e-5)
    assert not ours[..., width:].any()


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = nn.ModuleList([layers.Linear(7, 6), layers.Linear(7, 10)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([part for parts in chunks(list(self.sizes), x, 2) for part in parts], 1)


def test_it_compiles_into_one_graph(one_launch: None) -> None:
    routed = pack_experts([Embeds() for _ in range(3)], GROUPS)
    x, t = torch.randn(5, 7), torch.tensor([999, 0, 150, 400, 99])
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), routed(x, t), rtol=1e-5, atol=1e-5)


def test_a_network_of_skip_paths_has_no_embedding() -> None:
    model = UNet(8, 2, 32, 2, 1, (), channel_mult=(1,))
    routed = pack_experts(model, GROUPS, shuffled_plan(model, [{u.name: 0 for u in model.pruning_units()}] * 3))
    x, t, _ = batch()
    assert routed(x, t).shape == x.shape
