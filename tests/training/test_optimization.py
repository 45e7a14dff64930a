"""Learning-rate schedule and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdc_fast.training.optimization import LearningRate, gradient_norm
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
