"""Moving averages of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdc_fast.training.ema import WeightAverages
from tests.operators import Recorded


def moved(model: nn.Module, averages: WeightAverages, steps: int) -> None:
    for n in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(1.0)
        averages.update(torch.tensor(float(n), dtype=torch.float64))


def test_each_rate_has_its_own_average():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = WeightAverages(model, ("0.5", "0.75"))
    moved(model, averages, 2)
    # rate r: weight 1 then 2, from average 0: r * (1 - r) * 1 + (1 - r) * 2
    assert averages.state_dict("0.5")["weight"].item() == 1.25
    assert averages.state_dict("0.75")["weight"].item() == 0.6875


def test_the_ramp_forgets_the_start_of_a_short_run():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = WeightAverages(model, ("0.9999",), ramp=True)
    moved(model, averages, 1)
    torch.testing.assert_close(averages.state_dict("0.9999")["weight"], torch.full((1, 1), 1 - 2 / 11))


def ramped(steps: int, rates: tuple[str, ...], layers: int = 3) -> tuple[nn.Module, WeightAverages]:
    """A model whose weights change at every step, and its averages after the last one."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(9, 5, 3) for _ in range(layers))).to(memory_format=torch.channels_last)
    averages = WeightAverages(model, rates, ramp=True)
    for n in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
        averages.update(torch.tensor(float(n), dtype=torch.float64))
    return model, averages


def test_the_ramp_is_torchs_lerp_by_the_bits_on_the_cpu():
    model, averages = ramped(1, ("0.9",))
    expected = [average.clone() for average in averages.averages["0.9"]]
    for n in range(2, 15):
        share = torch.tensor(1 - min(0.9, (1 + n) / (10 + n)), dtype=torch.float64).float()
        for average, weight in zip(expected, model.parameters(), strict=True):
            average.lerp_(weight.detach(), share)
        averages.update(torch.tensor(float(n), dtype=torch.float64))
    assert all(map(torch.equal, averages.averages["0.9"], expected))


def test_on_a_gpu_the_ramp_takes_one_operator_for_all_parameters(monkeypatch: pytest.MonkeyPatch):
    expected = ramped(14, ("0.9", "0.3"))[1].averages
    monkeypatch.setattr("tdc_fast.training.ema._launches_cost", lambda device: True)
    model, averages = ramped(14, ("0.9", "0.3"))
    for rate, values in expected.items():
        torch.testing.assert_close(averages.averages[rate], values, rtol=1e-5, atol=5e-6)
    calls = []
    for layers in (1, 6):
        weights, one_more = ramped(2, ("0.9", "0.3"), layers)
        before, n = [weight.clone() for weight in weights.parameters()], torch.tensor(3.0, dtype=torch.float64)
        with Recorded() as called:
            one_more.update(n)
        assert called["_fused_sgd_"] == 2 and "_foreach_lerp_" not in called
        assert all(map(torch.equal, before, weights.parameters()))
        calls.append(called)
    assert calls[0] == calls[1]


def test_the_state_dict_is_the_models_with_averaged_parameters():
    model = nn.BatchNorm1d(2)
    averages = WeightAverages(model, ("0.9",))
    state = averages.state_dict("0.9")
    assert state.keys() == model.state_dict().keys()
    state = {name: value + 1 for name, value in state.items()}
    averages.load_state_dict("0.9", state)
    torch.testing.assert_close(averages.state_dict("0.9")["weight"], torch.full((2,), 2.0))
    torch.testing.assert_close(model.weight.detach(), torch.ones(2))
