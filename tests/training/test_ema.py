"""Moving averages of weights."""

from __future__ import annotations

import torch
from torch import nn

from tdc_fast.training.ema import WeightAverages


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


def test_the_state_dict_is_the_models_with_averaged_parameters():
    model = nn.BatchNorm1d(2)
    averages = WeightAverages(model, ("0.9",))
    state = averages.state_dict("0.9")
    assert state.keys() == model.state_dict().keys()
    state = {name: value + 1 for name, value in state.items()}
    averages.load_state_dict("0.9", state)
    torch.testing.assert_close(averages.state_dict("0.9")["weight"], torch.full((2,), 2.0))
    torch.testing.assert_close(model.weight.detach(), torch.ones(2))
