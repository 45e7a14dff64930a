"""torch.compile(fullgraph=True) through a small routed network gives the eager result, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdc_fast import RoutingPlan, TimestepGroups, routed_conv2d, routed_group_norm, routed_linear


class Network(nn.Module):
    """Two pruned convolutions around a norm, with every optional argument in use."""

    def __init__(self, num_groups: int = 3, channels: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3)

        self.weight_in = parameter(num_groups, channels, channels, 3, 3)
        self.bias_in = parameter(num_groups, channels)
        self.weight_out = parameter(num_groups, channels, channels, 3, 3)
        self.embed = parameter(num_groups, channels, 4)
        self.norm = parameter(num_groups, channels)
        self.norm_bias = parameter(num_groups, channels)
        self.register_buffer("widths", torch.tensor([8, 4, 2], dtype=torch.int32))
        self.groups = TimestepGroups.uniform(100, num_groups)

    def forward(self, x: Tensor, emb: Tensor, t: Tensor) -> Tensor:
        plan = RoutingPlan.from_groups(self.groups.group_of(t), 3)
        return plan.unsort(self.routed(plan.sort(x), plan.sort(emb), plan))

    def routed(self, x: Tensor, emb: Tensor, plan: RoutingPlan) -> Tensor:
        shift = routed_linear(emb, self.embed, None, plan)
        h = routed_conv2d(x, self.weight_in, self.bias_in, plan, padding=1, out_widths=self.widths, sample_bias=shift)
        h = routed_group_norm(
            h, self.norm, self.norm_bias, plan, num_groups=4, widths=self.widths, scale=shift, activation="silu"
        )
        return routed_conv2d(h, self.weight_out, None, plan, padding=1, in_widths=self.widths, residual=x)


def run(network: Network, function, x: Tensor, *args) -> list[Tensor]:
    network.zero_grad()
    leaf = x.clone().requires_grad_()
    y = function(leaf, *args)
    y.square().mean().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in network.parameters())]


def inputs(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 8, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    return x, torch.randn(batch, 4, generator=generator), torch.randint(0, 100, (batch,), generator=generator)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_plan_may_be_built_inside_the_graph(backend: str) -> None:
    network = Network()
    eager = run(network, network, *inputs())
    compiled = run(network, torch.compile(network, fullgraph=True, backend=backend), *inputs())
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_the_plan_may_be_built_outside_the_graph() -> None:
    network = Network()
    x, emb, t = inputs()
    function = torch.compile(network.routed, fullgraph=True, backend="aot_eager")
    for steps in (t, 99 - t):  # a second plan needs no new graph
        plan = RoutingPlan.from_groups(network.groups.group_of(steps), 3)
        torch.testing.assert_close(
            run(network, function, x, emb, plan), run(network, network.routed, x, emb, plan), rtol=1e-4, atol=1e-5
        )


def test_the_batch_size_may_be_dynamic() -> None:
    network = Network()
    function = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (6, 3, 11):
        torch.testing.assert_close(
            run(network, function, *inputs(batch)), run(network, network, *inputs(batch)), rtol=1e-4, atol=1e-5
        )


def test_autocast_is_captured() -> None:
    network = Network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = run(network, network, *inputs())
        compiled = run(network, torch.compile(network, fullgraph=True, backend="aot_eager"), *inputs())
    assert eager[0].dtype == compiled[0].dtype == torch.bfloat16
    torch.testing.assert_close(compiled, eager)


def test_wrong_arguments_are_refused_while_compiling() -> None:
    def wrong(x: Tensor, plan: RoutingPlan) -> Tensor:
        return routed_conv2d(x, torch.zeros(3, 4, 5, 1, 1), None, plan)

    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 3)
    with pytest.raises(Exception, match="weight: got"):
        torch.compile(wrong, fullgraph=True, backend="aot_eager")(torch.zeros(2, 8, 4, 4), plan)
