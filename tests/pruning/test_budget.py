"""The budget law, the order of difficulty, and budgets given by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast.pruning.budget import (
    budget_law,
    budget_of,
    difficulty_order,
    explicit_fractions,
    group_fractions,
    keep_fractions,
)

QUARTERS = [(0, 250), (250, 500), (500, 750), (750, 1000)]
SNR_DB = np.linspace(40.0, -50.0, 1000)  # falls with t, as every schedule's does


def test_ten_groups_at_k_06_cost_082_of_the_base_on_average() -> None:
    law = budget_law(10, 0.6)
    assert law[0] == pytest.approx(0.64) and law[-1] == 1.0
    assert np.mean(law) == pytest.approx(0.82)


@given(st.integers(1, 40), st.floats(1e-6, 1.0))
def test_the_law_is_the_papers_formula_and_mean(num_groups: int, k: float) -> None:
    law = budget_law(num_groups, k)
    by_formula = [i / num_groups + (num_groups - i) / num_groups * k for i in range(1, num_groups + 1)]
    assert law == pytest.approx(by_formula)
    mean = (num_groups + 1) / (2 * num_groups) + k * (num_groups - 1) / (2 * num_groups)
    assert np.mean(law) == pytest.approx(mean)
    assert law[-1] == 1.0 and list(law) == sorted(law)


def test_k_one_and_a_single_group_leave_everything_whole() -> None:
    assert budget_law(7, 1.0) == (1.0,) * 7
    assert budget_law(1, 0.1) == (1.0,)


@pytest.mark.parametrize("k", [0, -0.5, 1.01, float("nan"), "0.6", True, None])
def test_k_outside_its_range_is_refused(k: object) -> None:
    with pytest.raises(ValueError, match="k: got"):
        budget_law(4, k)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_groups", [0, -1, 2.0, True])
def test_a_senseless_number_of_groups_is_refused(num_groups: object) -> None:
    with pytest.raises(ValueError, match="num_groups"):
        budget_law(num_groups, 0.5)  # type: ignore[arg-type]


def test_difficulty_rises_with_snr_by_default_and_can_be_reversed_or_measured() -> None:
    assert difficulty_order(QUARTERS, SNR_DB) == (3, 2, 1, 0)
    assert difficulty_order(QUARTERS, SNR_DB, "snr-reversed") == (0, 1, 2, 3)
    assert difficulty_order(QUARTERS, SNR_DB, [0.2, 0.9, 0.1, 0.5]) == (2, 0, 3, 1)


@pytest.mark.parametrize("difficulty", ["hard", [1.0, 2.0], [1.0, 2.0, 3.0, float("nan")]])
def test_an_unknown_difficulty_is_refused(difficulty: object) -> None:
    with pytest.raises(ValueError, match="difficulty"):
        difficulty_order(QUARTERS, SNR_DB, difficulty)  # type: ignore[arg-type]


def test_the_clean_group_keeps_the_base_and_the_noisiest_gets_least() -> None:
    assert group_fractions(QUARTERS, SNR_DB, 0.5) == pytest.approx((1.0, 0.875, 0.75, 0.625))
    assert group_fractions(QUARTERS, SNR_DB, 0.5, "snr-reversed") == pytest.approx((0.625, 0.75, 0.875, 1.0))


def test_shares_can_be_given_for_every_group() -> None:
    assert group_fractions(QUARTERS, SNR_DB, (1, 1, 0.7, 0.7)) == (1.0, 1.0, 0.7, 0.7)
    assert keep_fractions(4, 0.7, whole=(0, 1)) == (1.0, 1.0, 0.7, 0.7)


def test_shares_of_the_wrong_number_or_size_are_refused_by_index() -> None:
    with pytest.raises(ValueError, match="each of the 4 groups"):
        explicit_fractions([0.5, 0.5], 4)
    with pytest.raises(ValueError, match=r"k\[1\]"):
        explicit_fractions([0.5, 1.5], 2)
    with pytest.raises(ValueError, match="whole"):
        keep_fractions(4, 0.7, whole=(4,))


@given(st.floats(0.001, 1.0), st.integers(1, 10**12))
def test_a_budget_in_macs_never_exceeds_its_share(fraction: float, base: int) -> None:
    macs = budget_of(fraction, base)
    assert macs <= base and fraction * base - 1 - 1e-3 <= macs <= fraction * base + 1e-3
    assert budget_of(0.82, 100) == 82
