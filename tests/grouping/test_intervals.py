"""Divisions of a line into contiguous intervals are the cheapest there are, whatever is measured."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast.grouping.intervals import divide, elbow, scatter_of_similarity, scatter_of_values


def total(cost: np.ndarray, cuts: tuple[int, ...]) -> float:
    return sum(cost[a, b] for a, b in itertools.pairwise(cuts))


def every_division(items: int, intervals: int):
    for inner in itertools.combinations(range(1, items), intervals - 1):
        yield (0, *inner, items)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7), st.data())
def test_the_division_is_the_cheapest_of_all(values: list[int], data: st.DataObject) -> None:
    intervals = data.draw(st.integers(1, len(values)))
    weights = np.array(data.draw(st.lists(st.integers(1, 3), min_size=len(values), max_size=len(values))), dtype=float)
    cost = scatter_of_values(values, weights)
    found = divide(cost, intervals)
    best = min(total(cost, cuts) for cuts in every_division(len(values), intervals))
    assert found.cuts[0] == 0 and found.cuts[-1] == len(values) and found.num_intervals == intervals
    assert total(cost, found.cuts) == pytest.approx(best, abs=1e-9)
    assert found.costs[-1] == pytest.approx(best, abs=1e-9)


def test_scatter_of_values_is_the_weighted_squared_distance_from_the_mean() -> None:
    values, weights = np.array([1.0, 4.0, -2.0, 7.5]), np.array([1.0, 2.0, 3.0, 0.5])
    cost = scatter_of_values(values, weights)
    for i, j in itertools.combinations(range(5), 2):
        v, w = values[i:j], weights[i:j]
        assert cost[i, j] == pytest.approx((w * (v - np.average(v, weights=w)) ** 2).sum(), abs=1e-9)
    assert np.isinf(cost[np.tril_indices(5)]).all()


def test_scatter_of_similarity_is_that_of_the_unit_vectors() -> None:
    rng = np.random.default_rng(0)
    units = rng.normal(size=(6, 4))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    weights = np.array([1.0, 2.0, 1.0, 3.0, 1.0, 0.5])
    cost = scatter_of_similarity(units @ units.T, weights)
    for i, j in itertools.combinations(range(7), 2):
        u, w = units[i:j], weights[i:j, None]
        mean = (w * u).sum(0) / w.sum()
        assert cost[i, j] == pytest.approx((w * (u - mean) ** 2).sum(), abs=1e-9)


def test_the_elbow_is_where_the_curve_bends() -> None:
    assert elbow([10, 5, 1, 0.9, 0.8, 0.7]) == 3
    assert elbow([4, 3, 2, 1]) == 1  # a straight line has none
    assert elbow([7]) == 1


def test_the_elbow_finds_as_many_intervals_as_there_are_levels() -> None:
    values = [0.0] * 5 + [10.0] * 4 + [-3.0] * 6
    assert divide(scatter_of_values(values), None, max_intervals=8).cuts == (0, 5, 9, 15)


@given(st.lists(st.integers(-9, 9), min_size=5, max_size=8), st.integers(0, 3))
def test_cuts_given_by_hand_move_no_further_than_allowed(values: list[int], within: int) -> None:
    cost, near = scatter_of_values(values), (0, 2, 4, len(values))
    found = divide(cost, 3, near=near, within=within)
    assert all(abs(a - b) <= within for a, b in zip(found.cuts, near, strict=True))
    allowed = [c for c in every_division(len(values), 3) if np.abs(np.subtract(c, near)).max() <= within]
    assert total(cost, found.cuts) == pytest.approx(min(total(cost, c) for c in allowed), abs=1e-9)


@pytest.mark.parametrize("intervals", [0, 4, -1])
def test_a_number_of_intervals_out_of_range_is_named(intervals: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups.*{intervals}.*1 to 3"):
        divide(scatter_of_values([1.0, 2.0, 3.0]), intervals)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="values"):
        scatter_of_values([1.0, float("nan")])
    with pytest.raises(ValueError, match="similarity"):
        scatter_of_similarity(np.full((2, 2), np.inf))
