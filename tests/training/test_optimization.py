"""Learning-rate schedule and clipping."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tdc_fast.training import TrainConfig
from tdc_fast.training.messages import warn_of_idle_steps
from tdc_fast.training.optimization import LearningRate, create_optimizer, gradient_norm, load_moments
from tests.operators import Recorded


def with_gradients(*values: torch.Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(value)) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()
    return parameters


def test_the_rate_anneals_as_improved_diffusions_does():
    rate = LearningRate(2.0, anneal_end=4)
    assert [rate(step) for step in range(6)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_warm_up_and_a_late_fall():
    rate = LearningRate(1.0, warmup=2, anneal_start=4, anneal_end=8)
    assert [rate(step) for step in range(8)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("changes", "warned"),
    [({"lr_anneal_steps": 9}, True), ({"lr_anneal_steps": 10}, False), ({}, False), ({"baseline_steps": 40}, False)],
)
def test_steps_after_the_rate_has_fallen_to_0_are_warned_of(changes, warned):
    config = TrainConfig(data_dir="digits", image_size=8, groups=2, stage1_steps=10, stage2_steps=5, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_idle_steps(config)
    assert [str(one.message).partition(":")[2] for one in caught] == [" the last 1 train nothing"] * warned


def test_loaded_moments_are_those_of_their_own_weights_whatever_their_memory_order():
    """In files of improved-diffusion they are contiguous, and one number of steps may be that of all weights."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double().to(memory_format=torch.channels_last)
    twin = [parameter.detach().clone().contiguous() for parameter in layer.parameters()]
    optimizer, steps = create_optimizer(layer, 0.1, 0.01), torch.tensor(5.0)
    moments = {
        i: {"step": steps, "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
        for i, p in enumerate(twin)
    }
    load_moments(optimizer, moments)
    for step in (6, 7):
        for number, parameter in enumerate(layer.parameters()):
            parameter.grad = torch.randn_like(parameter)
            first, second = (moments[number][name].double() for name in ("exp_avg", "exp_avg_sq"))
            first = 0.9 * first + 0.1 * parameter.grad
            second = 0.999 * second + 0.001 * parameter.grad**2
            moments[number] |= {"exp_avg": first, "exp_avg_sq": second}
            move = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            twin[number] = twin[number] * (1 - 0.1 * 0.01) - 0.1 * move
        optimizer.step()
        for parameter, expected in zip(layer.parameters(), twin, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-10)


def test_the_norm_is_that_before_clipping():
    parameters = with_gradients(torch.tensor([3.0]), torch.tensor([4.0]))
    assert gradient_norm(parameters, 1.0).item() == pytest.approx(5.0)
    assert [p.grad.item() for p in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_without_a_limit_gradients_stay():
    parameters = with_gradients(torch.tensor([3.0]), torch.tensor([4.0]))
    assert gradient_norm(parameters, 0.0, num_experts=1).item() == pytest.approx(5.0)
    assert [p.grad.item() for p in parameters] == [3.0, 4.0]


def test_each_expert_is_clipped_by_its_own_norm():
    parameters = with_gradients(torch.tensor([[30.0], [0.3]]), torch.tensor([40.0, 0.4]))
    norm = gradient_norm(parameters, 1.0, num_experts=2)
    assert norm.item() == pytest.approx((50.0**2 + 0.5**2) ** 0.5)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[0.6], [0.3]]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8, 0.4]))


def test_clipping_by_expert_calls_as_many_operators_whatever_the_number_of_parameters():
    """And copies no gradient, whose memory order is that of a channels_last weight."""
    calls = []
    for count in (2, 20):
        parameters = with_gradients(*torch.randn(count, 3, 8, 3, 3, 5).permute(0, 1, 2, 5, 3, 4).unbind())
        before = [parameter.grad.clone() for parameter in parameters]
        with Recorded() as called:
            gradient_norm(parameters, 0.1, num_experts=3)
        of_expert = torch.stack(before).double().square().sum((0, 2, 3, 4, 5)).sqrt()
        for parameter, gradient in zip(parameters, before, strict=True):
            expected = gradient * (0.1 / of_expert).view(-1, 1, 1, 1, 1)
            torch.testing.assert_close(parameter.grad, expected.float(), rtol=1e-5, atol=1e-7)
        calls.append({name: times for name, times in called.items() if name != "select"})  # a view
    assert calls[0] == calls[1] and not {"clone", "copy_", "mul_"} & set(calls[0])
