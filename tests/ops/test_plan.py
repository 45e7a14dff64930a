"""The routing plan is a stable sort by group whose permutations invert each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from tdc_fast import RoutingPlan
from tdc_fast.ops import native

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8]


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=40))))
def test_it_is_a_stable_sort_with_offsets(problem: tuple[int, list[int]]) -> None:
    num_groups, groups = problem
    plan = RoutingPlan.from_groups(torch.tensor(groups, dtype=torch.int64), num_groups)
    order = sorted(range(len(groups)), key=lambda i: groups[i])
    assert plan.order.tolist() == order
    assert plan.inverse.tolist() == [order.index(i) for i in range(len(groups))]
    assert plan.offsets.tolist() == [sum(g < bound for g in groups) for bound in range(num_groups + 1)]
    assert plan.groups.tolist() == sorted(groups)
    assert plan.weight_index.tolist() == list(range(num_groups))
    assert (plan.order.dtype, plan.inverse.dtype) == (torch.int64, torch.int64)
    assert (plan.offsets.dtype, plan.weight_index.dtype) == (torch.int32, torch.int32)
    assert (plan.batch_size, plan.num_groups) == (len(groups), num_groups)


def test_without_the_native_module_the_plan_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = torch.tensor([3, 0, 2, 2, 0, 3, 3])
    with_native = RoutingPlan.from_groups(groups, 5)
    monkeypatch.setattr(native, "module", None)
    without = RoutingPlan.from_groups(groups, 5)
    for name in ("order", "inverse", "offsets", "groups"):
        assert torch.equal(getattr(with_native, name), getattr(without, name)), name
    with pytest.raises(ValueError, match=r"groups: got '5 for sample 1'; expected .*\[0, 5\)"):
        RoutingPlan.from_groups(torch.tensor([0, 5]), 5)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_dtype_and_any_stride_will_do(dtype: torch.dtype) -> None:
    groups = torch.tensor([2, 9, 0, 9, 1, 9], dtype=dtype)[::2]
    assert RoutingPlan.from_groups(groups, 3).order.tolist() == [1, 2, 0]


@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_a_group_out_of_range_is_named(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"groups: got '{bad} for sample 2'; expected .*\[0, 4\)"):
        RoutingPlan.from_groups(torch.tensor([0, 3, bad, 1]), 4)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("groups", {"groups": torch.zeros(2, 2, dtype=torch.int64)}),
        ("groups", {"groups": torch.zeros(2)}),
        ("groups", {"groups": torch.zeros(2, dtype=torch.bool)}),
        ("groups", {"groups": [0, 0.5]}),
        ("num_groups", {"num_groups": 0}),
        ("num_groups", {"num_groups": -1}),
        ("num_groups", {"num_groups": 2.0}),
        ("weight_index", {"weight_index": [0, 1]}),
        ("weight_index", {"weight_index": torch.zeros(2, dtype=torch.int32)}),
        ("weight_index", {"weight_index": torch.zeros(3)}),
    ],
)
def test_wrong_arguments_are_named(argument: str, arguments: dict[str, object]) -> None:
    defaults = {"groups": torch.zeros(2, dtype=torch.int64), "num_groups": 3}
    with pytest.raises(ValueError, match=f"^{argument}: "):
        RoutingPlan.from_groups(**(defaults | arguments))


def test_sort_and_unsort_invert_each_other_and_keep_the_layout() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([2, 0, 1, 0]), 3)
    for x in (
        torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 5, 2),
        torch.randn(4, 7),
        torch.arange(4),
        torch.randn(8, 3)[::2],
    ):
        ordered = plan.sort(x)
        assert torch.equal(ordered, x[plan.order])
        assert torch.equal(plan.unsort(ordered), x)
        if x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else False:
            assert ordered.is_contiguous(memory_format=torch.channels_last)


def test_an_ordered_batch_is_copied_not_aliased() -> None:
    x = torch.randn(3, 2)
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 1]), 2)
    plan.sort(x).zero_()
    assert x.any()


def test_sorting_has_the_gradient_of_a_permutation() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([2, 0, 1, 0]), 3)
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.sort, (x,))
    assert torch.autograd.gradgradcheck(plan.unsort, (x,))


def test_another_batch_is_refused() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    for permute in (plan.sort, plan.unsort):
        with pytest.raises(ValueError, match="x: got .*expected 2 samples"):
            permute(torch.zeros(3, 1))


def test_several_groups_may_share_an_expert() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    shared = plan.with_weight_index(torch.zeros(2, dtype=torch.int32))
    assert shared.weight_index.tolist() == [0, 0] and shared.order is plan.order


def test_a_plan_is_a_pytree() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([1, 0]), 2)
    leaves, spec = _pytree.tree_flatten(plan)
    assert len(leaves) == 6
    assert torch.equal(_pytree.tree_unflatten(leaves, spec).order, plan.order)


def test_groups_without_values_are_not_validated() -> None:
    groups = torch.zeros(4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="validate: got True; expected False for groups on the meta device"):
        RoutingPlan.from_groups(groups, 2, validate=True)
    assert RoutingPlan.from_groups(groups, 2).order.is_meta
