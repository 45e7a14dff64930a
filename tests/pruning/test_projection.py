"""Any proposal is moved exactly onto the budget, as little as possible."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.models.iddpm import UNet
from tdc_fast.pruning.budget import budget_of
from tdc_fast.pruning.costs import UnitCosts
from tests.pruning.tiny import task_of, tiny_task


def test_a_proposal_is_moved_to_the_nearest_widths_within_the_budget() -> None:
    task = tiny_task(9 + 6 * 5)
    assert task.project({"layers.0": 2, "layers.1": 3}).widths == {"layers.0": 2, "layers.1": 3}
    near = task.project({"layers.0": 4, "layers.1": 3}, weights={"layers.0": 9.0}).widths
    assert near == {"layers.0": 4, "layers.1": 1}
    near = task.project({"layers.0": 4, "layers.1": 3}, weights={"layers.1": 9.0}).widths
    assert near == {"layers.0": 2, "layers.1": 3}
    low = task.project({"layers.0": 0, "layers.1": 0})
    assert low.reached and low.cost == task.budget


@settings(max_examples=40, deadline=None)
@given(st.data(), st.floats(0.25, 1.0))
def test_any_proposal_can_be_moved_onto_a_unets_budget(
    unet: UNet, unet_costs: UnitCosts, data: st.DataObject, share: float
) -> None:
    task = task_of(unet.pruning_units(), unet_costs, budget_of(share, unet_costs.full()))
    proposal = {unit.name: data.draw(st.integers(0, unit.channels)) for unit in task.units}
    solution = task.project(proposal)
    assert solution.reached
    if unet_costs.full() == task.budget or not all(proposal[u.name] in u.widths() for u in task.units):
        return
    if solution.floor <= unet_costs.total(proposal) <= task.budget:
        assert solution.widths == proposal


@pytest.mark.parametrize(
    "proposal",
    [
        {"layers.0": 1},
        {"layers.0": 1, "layers.1": 7},
        {"layers.0": -1, "layers.1": 1},
        {"layers.0": 1.5, "layers.1": 1},
        {"layers.0": True, "layers.1": 1},
    ],
)
def test_a_proposal_of_other_units_or_impossible_widths_is_refused(proposal: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="proposal"):
        tiny_task(40).project(proposal)
