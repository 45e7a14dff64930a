"""Measured MACs are a constant plus one function of each unit's width."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.pruning.costs import unit_costs
from tests.pruning.tiny import TinyNet, tiny_net


@pytest.mark.parametrize("flat_names", [False, True])
def test_costs_of_a_small_net_are_those_worked_out_by_hand(flat_names: bool) -> None:
    costs = unit_costs(tiny_net(flat_names=flat_names), torch.zeros(5, 3, dtype=torch.float64))
    first, second = costs.tables
    assert costs.fixed == 3 * 3
    assert costs.tables[first] == {width: 2 * 3 * width for width in range(5)}
    assert costs.tables[second] == {width: 2 * 3 * width for width in range(7)}
    assert (costs.full(), costs.least()) == (9 + 6 * 4 + 6 * 6, 9)


def test_forward_and_backward_are_both_counted() -> None:
    net, x, t = tiny_net(), torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5)
    forward = measure_macs(net, x, t)
    assert forward == 5 * (9 + 6 * 4 + 6 * 6)
    with MacCounter() as counter:
        net(x, t).sum().backward()
    assert counter.macs == 3 * forward - 5 * 9  # the input of the first layer needs no gradient


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_unets_costs_add_up_for_any_widths(scale_shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdc_fast.pruning.costs._costs_one_by_one", None)  # all units are measured in the same passes
    unet = create_unet(
        image_size=16, num_channels=32, num_res_blocks=1, num_heads=4, channel_mult="1,2", in_channels=3,
        attention_resolutions="8", use_scale_shift_norm=scale_shift, class_cond=True, num_classes=3,
    )  # fmt: skip
    x, y, t = torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    costs = unit_costs(unet, x, {"y": y})
    assert costs.full() == measure_macs(unet, x, t, y=y)
    rng = np.random.default_rng(0)
    for _ in range(3):
        widths = {unit.name: int(rng.choice(unit.widths())) for unit in unet.pruning_units()}
        assert costs.total(widths) == measure_macs(unet.with_widths(widths), x, t, y=y)
    for unit in unet.pruning_units():
        table = costs.tables[unit.name]
        assert tuple(table) == unit.widths() and table[0] == 0
        assert all(macs * unit.channels == table[unit.channels] * width for width, macs in table.items())


def test_measuring_leaves_no_trace_on_the_model() -> None:
    net = tiny_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    unit_costs(net, torch.zeros(2, 3, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Entangled(TinyNet):
    """The second layer works harder when the first one is wide: no sum of functions of single widths."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = super().forward(x, t)
        return h + self.layers[1](h) if self.layers[0].width > 2 else h

    def with_widths(self, widths: Mapping[str, int]) -> nn.Module:
        first = next(self.parameters())
        return Entangled(self.features, self.channels, self.atom, {**self.widths, **widths}).to(first.device)


def test_a_model_whose_costs_do_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="constant plus one function"):
        unit_costs(Entangled(), torch.zeros(1, 3))
