"""The native routing plan: a stable counting sort that refuses an id out of range without writing anything."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast import _native

UNTOUCHED = -7


def plan(groups: list[int], num_groups: int) -> tuple[int, list[int], list[int], list[int]]:
    """Index of the first bad id or -1, then order, inverse and offsets."""
    ids = torch.tensor(groups, dtype=torch.int64)
    order = torch.full((len(groups),), UNTOUCHED, dtype=torch.int64)
    inverse = torch.full_like(order, UNTOUCHED)
    offsets = torch.full((num_groups + 1,), UNTOUCHED, dtype=torch.int32)
    bad = _native.routing_plan(
        groups=ids.data_ptr(),
        order=order.data_ptr(),
        inverse=inverse.data_ptr(),
        offsets=offsets.data_ptr(),
        batch=len(groups),
        num_groups=num_groups,
    )
    return bad, order.tolist(), inverse.tolist(), offsets.tolist()


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int]:
    num_groups = draw(st.integers(1, 20))
    return draw(st.lists(st.integers(0, num_groups - 1), max_size=40)), num_groups


@settings(deadline=None)
@given(batches())
def test_order_is_a_stable_sort_and_inverse_undoes_it(batch: tuple[list[int], int]) -> None:
    groups, num_groups = batch
    bad, order, inverse, offsets = plan(groups, num_groups)
    assert bad == -1
    assert order == sorted(range(len(groups)), key=lambda b: groups[b])
    assert [order[i] for i in inverse] == list(range(len(groups)))
    assert offsets == [sum(g < group for g in groups) for group in range(num_groups + 1)]


@settings(deadline=None)
@given(batches(), st.sampled_from([-1, -(2**40), 20, 2**32, 2**62]), st.integers(0, 40))
def test_the_first_id_out_of_range_is_named_and_nothing_is_written(
    batch: tuple[list[int], int], bad_id: int, position: int
) -> None:
    groups, num_groups = batch
    position = min(position, len(groups))
    bad, order, inverse, offsets = plan([*groups[:position], bad_id, *groups[position:], -5], num_groups)
    assert bad == position
    assert set(order) | set(inverse) | set(offsets) == {UNTOUCHED}
