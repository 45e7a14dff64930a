"""The solver finds the best widths that a budget buys, exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.pruning import solver
from tdc_fast.pruning.solver import UnitTable, solve


@st.composite
def tables(draw: st.DrawFn) -> list[UnitTable]:
    """Up to five units with up to five widths: costs and values without any order, with many ties."""
    made = []
    for unit in range(draw(st.integers(0, 5))):
        count = draw(st.integers(1, 5))
        macs = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
        value = st.one_of(st.integers(-3, 3).map(float), st.floats(-5, 5))
        values = draw(st.lists(value, min_size=count, max_size=count))
        made.append(UnitTable(f"unit{unit}", tuple(range(count)), tuple(macs), tuple(values)))
    return made


def best_by_trying_all(units: list[UnitTable], fixed: int, low: int, high: int) -> float | None:
    best = None
    for picks in itertools.product(*(range(len(unit.widths)) for unit in units)):
        macs = fixed + sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=True))
        value = sum(unit.values[pick] for unit, pick in zip(units, picks, strict=True))
        if low <= macs <= high and (best is None or value > best):
            best = value
    return best


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 10), st.integers(0, 250), st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_agrees_with_trying_every_choice(units: list[UnitTable], fixed: int, budget: int, tolerance: float) -> None:
    check_against_trying_every_choice(units, fixed, budget, tolerance)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_and_repeated_passes_lose_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny limits send small problems where large ones go: passes that drop states, then ever tighter bounds."""
    monkeypatch.setattr(solver, "_FIRST_LIMIT", 1)
    monkeypatch.setattr(solver, "_LIMIT_GROWTH", 2)
    rng = np.random.default_rng(seed)
    units = []
    for unit in range(4):
        macs, values = rng.integers(0, 100, size=5), np.round(rng.exponential(size=5) * 10, 1)
        units.append(UnitTable(f"unit{unit}", tuple(range(5)), tuple(macs.tolist()), tuple(values.tolist())))
    least = sum(min(unit.costs) for unit in units)
    for budget in rng.integers(least, 400, size=5).tolist():
        check_against_trying_every_choice(units, 0, budget, float(rng.choice([0.01, 0.5, 0.99])))


def check_against_trying_every_choice(units: list[UnitTable], fixed: int, budget: int, tolerance: float) -> None:
    if best_by_trying_all(units, fixed, 0, budget) is None:
        least = fixed + sum(min(unit.costs) for unit in units)
        with pytest.raises(ValueError, match=f"at least {least}, the smallest reachable"):
            solve(units, budget, fixed=fixed, tolerance=tolerance)
        return
    solution = solve(units, budget, fixed=fixed, tolerance=tolerance)
    picks = [unit.widths.index(solution.widths[unit.name]) for unit in units]
    assert solution.cost == fixed + sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=True))
    assert solution.cost <= budget
    in_window = best_by_trying_all(units, fixed, solution.floor, budget)
    assert solution.reached == (in_window is not None)
    expected = in_window if in_window is not None else best_by_trying_all(units, fixed, 0, budget)
    assert solution.value == pytest.approx(expected, abs=1e-9)


def test_the_lower_end_of_the_window_binds_when_value_lies_below_it() -> None:
    unit = UnitTable("unit", (0, 1, 2), (10, 50, 99), (5.0, 9.0, 1.0))
    assert solve([unit], 100).widths == {"unit": 2}
    assert solve([unit], 100, tolerance=0.6).widths == {"unit": 1}


def test_the_window_is_one_percent_below_the_budget_with_both_ends_included() -> None:
    at_floor = UnitTable("unit", (0, 1), (0, 99_000), (0.0, 1.0))
    below_floor = UnitTable("unit", (0, 1), (0, 98_999), (0.0, 1.0))
    assert solve([at_floor], 100_000).reached
    assert not solve([below_floor], 100_000).reached
    assert solve([UnitTable("unit", (0, 1), (0, 100_000), (0.0, 1.0))], 100_000).widths == {"unit": 1}


def test_an_unreachable_window_gives_the_best_below_and_says_so() -> None:
    units = [UnitTable("a", (0, 8), (0, 40), (0.0, 1.0)), UnitTable("b", (0, 8), (0, 45), (0.0, 2.0))]
    solution = solve(units, 60, fixed=5)
    assert (solution.widths, solution.cost, solution.reached) == ({"a": 0, "b": 8}, 50, False)
    assert "best below the budget has 50" in solution.statement()


def large_problem(values_follow_costs: bool) -> list[UnitTable]:
    rng = np.random.default_rng(0)
    units = []
    for unit in range(40):
        channels = (128, 256)[unit % 2]
        widths = tuple(range(0, channels + 1, 8))
        macs = tuple(width * (1024 + 9 * 256 * 4 ** (5 - unit % 5)) for width in widths)
        gains = np.full(len(widths) - 1, float(macs[1]))
        if not values_follow_costs:
            gains = np.sort(rng.random(len(gains)))[::-1]
        units.append(UnitTable(f"unit{unit}", widths, macs, tuple(np.r_[0.0, np.cumsum(gains)].tolist())))
    return units


@pytest.mark.parametrize("share", [0.2, 0.55, 0.9])
def test_a_network_of_forty_units_is_solved_within_a_thousandth_of_the_budget(share: float) -> None:
    units = large_problem(values_follow_costs=False)
    budget = int(share * sum(unit.costs[-1] for unit in units))
    solution = solve(units, budget)
    assert 0.999 * budget <= solution.cost <= budget
    assert solve(units, budget) == solution


def test_values_proportional_to_cost_fill_the_budget_as_far_as_sums_of_costs_can() -> None:
    units = large_problem(values_follow_costs=True)
    step = np.gcd.reduce([cost for unit in units for cost in unit.costs])
    budget = int(0.4 * sum(unit.costs[-1] for unit in units))
    solution = solve(units, budget)
    assert budget - solution.cost < 100 * step
    assert solution.value == solution.cost


@pytest.mark.parametrize(
    ("macs", "values"), [((1, -2), (0.0, 1.0)), ((1, 2), (0.0, float("nan"))), ((1,), (0.0, 1.0)), ((), ())]
)
def test_a_table_that_cannot_be_right_is_refused_by_name(macs: tuple, values: tuple) -> None:
    with pytest.raises(ValueError, match="middle_block.0"):
        UnitTable("middle_block.0", (0, 8), macs, values)


def test_a_tolerance_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        solve([], 10, tolerance=1.0)
