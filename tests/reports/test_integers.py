"""Integers are taken in every form that users have them in: tensors of any integer dtype, numpy arrays, sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tdc_fast import RoutingPlan, TimestepGroups, pack_experts, routed_linear
from tests.reports.test_routed_forward import Net, samples

GROUPS, WEIGHTS = [2, 0, 1, 0], [1, 0, 1]
FORMS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "numpy int32": lambda values: np.array(values, dtype=np.int32),
    "read-only numpy": lambda values: np.frombuffer(np.array(values).tobytes(), dtype=np.int64),
    "numpy integers": lambda values: [np.int16(value) for value in values],
    "int64": torch.tensor,
    "int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "uint8": lambda values: torch.tensor(values, dtype=torch.uint8),
    "strided": lambda values: torch.tensor(values).repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("form", FORMS)
def test_groups_and_weight_index_take_every_form(form: str) -> None:
    make = FORMS[form]
    expected = RoutingPlan.from_groups(torch.tensor(GROUPS), 3, torch.tensor(WEIGHTS, dtype=torch.int32))
    x, weight = torch.randn(4, 5), torch.randn(2, 6, 5)
    for plan in (
        RoutingPlan.from_groups(make(GROUPS), 3, make(WEIGHTS)),
        RoutingPlan.from_groups(make(GROUPS), 3).with_weight_index(make(WEIGHTS)),
    ):
        assert plan.weight_index.dtype == torch.int32 and plan.weight_index.tolist() == WEIGHTS
        assert plan.groups.tolist() == sorted(GROUPS) and torch.equal(plan.order, expected.order)
        assert torch.equal(routed_linear(x, weight, None, plan), routed_linear(x, weight, None, expected))


@pytest.mark.parametrize("form", FORMS)
def test_expert_ids_take_every_form(form: str) -> None:
    routed = pack_experts([Net() for _ in range(4)], TimestepGroups.uniform(100, 4))
    (x, t), ids = samples(0, 4), [3, 0, 1, 0]
    torch.testing.assert_close(routed(x, t, expert_ids=FORMS[form](ids)), routed(x, t, expert_ids=torch.tensor(ids)))


@pytest.mark.parametrize(
    "value",
    [
        [0.5, 1.0, 2.0],
        [True, False, True],
        [True, 0, 1],
        np.zeros(3),
        3,
        None,
        "abc",
        [[1], [2, 3]],
        torch.zeros(3),
        [None] * 3,
    ],
)
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^groups: got .*; expected"):
        RoutingPlan.from_groups(value, 3)
    if value is not None:
        with pytest.raises(ValueError, match=r"^weight_index: got .*; expected"):
            RoutingPlan.from_groups(GROUPS, 3, value)


def test_an_index_that_int32_cannot_hold_does_not_wrap_round() -> None:
    plan = RoutingPlan.from_groups([0, 0], 1, [2**32])
    with pytest.raises(ValueError, match="^weight_index: got"):
        routed_linear(torch.zeros(2, 5), torch.zeros(2, 6, 5), None, plan)


def test_a_truth_value_is_no_number_of_groups() -> None:
    with pytest.raises(ValueError, match="^num_groups: got True; expected an integer"):
        RoutingPlan.from_groups([0, 0], True)


def test_an_empty_batch_may_be_a_list() -> None:
    assert RoutingPlan.from_groups([], 2).offsets.tolist() == [0, 0, 0]
