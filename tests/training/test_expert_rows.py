"""Learning rates, averages and clipping by group: each row of the parameters trains as an expert of its own would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.routing import TimestepGroups
from tdc_fast.training.ema import WeightAverages
from tdc_fast.training.expert_rows import SlowRows, blocks_of, clip_by_row
from tdc_fast.training.optimization import create_optimizer

FACTORS = [1.0, 0.5, 0.5, 0.03]
STEPS = 6


def experts(shared_layers: str = "") -> RoutedModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Conv2d(5, 2, 1))
    return pack_experts(base, TimestepGroups.uniform(8, 4), shared_layers=shared_layers)


def gradients(model: nn.Module, step: int) -> None:
    """Gradients of expert e that do not depend on how many experts the parameter holds."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + number)
        drawn = torch.randn((4, *parameter.shape[1:]), generator=generator)[: len(parameter)]
        parameter.grad = torch.empty_like(parameter).copy_(drawn)  # in the memory order that the optimizer expects


def train(model: RoutedModel, factors: list[float]) -> RoutedModel:
    optimizer = create_optimizer(model, 1e-2, weight_decay=0.1)
    slow = SlowRows(blocks_of(model), factors)
    for step in range(STEPS):
        gradients(model, step)
        slow.keep()
        optimizer.step()
        slow.move_back()
    return model


def trained_alone(row: int, rate: float) -> list[Tensor]:
    """One expert in fp64, by AdamW with a rate of its own."""
    weights = [nn.Parameter(p.detach()[row].double()) for p in experts().parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.1)
    for step in range(STEPS):
        stacked = experts()
        gradients(stacked, step)
        for weight, parameter in zip(weights, stacked.parameters(), strict=True):
            weight.grad = parameter.grad[row].double()
        optimizer.step()
    return [weight.detach() for weight in weights]


def test_every_expert_trains_as_it_would_alone_with_its_own_rate():
    model = train(experts(), FACTORS)
    for row, factor in enumerate(FACTORS):
        for parameter, right in zip(model.parameters(), trained_alone(row, 1e-2 * factor), strict=True):
            torch.testing.assert_close(parameter.detach()[row].double(), right, rtol=1e-6, atol=1e-6)


def test_a_whole_rate_is_the_optimizers_own_to_the_last_bit():
    slowed, plain = train(experts(), FACTORS), train(experts(), [1.0] * 4)
    for one, other in zip(slowed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_rows_that_groups_share_have_the_mean_of_their_groups_factors():
    trained = [train(experts("0:2"), factors) for factors in (FACTORS, [0.75, 0.75, 0.265, 0.265])]
    for one, other in zip(*(model.routed_leaves()["0"].parameters() for model in trained), strict=True):
        assert len(one) == 2
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ramp", [False, True])
def test_averages_of_a_group_are_those_of_its_own_length(ramp: bool):
    lengths = [1.0, 2.0, 0.5, 0.1]
    model = experts()
    averages = WeightAverages(model, ("0.9", "0.99"), ramp, lengths)
    right = {rate: [p.detach().double() for p in model.parameters()] for rate in averages.averages}
    factor = torch.tensor(lengths, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for n in range(1, 200):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
        averages.update(torch.tensor(float(n), dtype=torch.float64))
        for rate, rows in right.items():
            shortest = 9 / (10 + n) if ramp else 0.0  # the ramp's 1 - rate
            share = (max(1 - float(rate), shortest) / factor).clamp(max=1)
            for average, weight in zip(rows, model.parameters(), strict=True):
                average.lerp_(weight.detach().double(), share.view(-1, *[1] * (weight.dim() - 1)))
    for rate, rows in right.items():
        for ours, theirs in zip(averages.averages[rate], rows, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_shared_weights_get_the_mean_of_their_groups_gradients_and_are_clipped_apart():
    model = experts("0,2:3")
    gradients(model, 0)
    before = {p: p.grad.clone() for p in model.parameters()}
    norm = clip_by_row(blocks_of(model), 1.0)
    counts = {"0": [4.0], "1": [1.0] * 4, "2": [3.0, 1.0]}
    squares = 0.0
    for name, leaf in model.routed_leaves().items():
        means = [before[p] / torch.tensor(counts[name]).view(-1, *[1] * (p.dim() - 1)) for p in leaf.parameters()]
        norms = torch.stack([m.flatten(1).norm(dim=1) for m in means]).norm(dim=0)
        squares += float(norms.square().sum())
        for parameter, mean in zip(leaf.parameters(), means, strict=True):
            scale = (1 / norms).clamp(max=1).view(-1, *[1] * (mean.dim() - 1))
            torch.testing.assert_close(parameter.grad, mean * scale, rtol=1e-5, atol=1e-6)
    assert norm.item() == pytest.approx(squares**0.5)
