"""What a failed comparison says: how many elements are wrong, and where."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import assert_as_accurate_as_torch, assert_same, places


def test_where_elements_are_wrong() -> None:
    expected = torch.arange(2 * 8 * 6, dtype=torch.float32).reshape(2, 8, 6)
    ours = expected.clone()
    ours[1, [0, 1, 2, 5], 4] += 7.0
    ours[1, 7, 3] = torch.nan
    said = places(ours, expected, 0.5)
    assert said == (
        "5 of 96 elements are wrong (1 NaN), in dimensions [1 of 2; 0-2, 5, 7 of 8; 3-4 of 6]; "
        "first (1, 0, 4): 59, expected 52"
    )
    assert places(expected, expected, 0.0) == "no element is wrong"
    assert places(torch.arange(40) * 2, torch.arange(40) // 2 * 4, 0.0).count("1, 3, 5, 7, ... (20) of 40")


def test_a_failed_comparison_says_where() -> None:
    expected = torch.zeros(4, 64)
    ours = expected.clone()
    ours[:, 32:] = 1.0
    with pytest.raises(AssertionError, match=r"y: 128 of 256 elements .* \[0-3 of 4; 32-63 of 64\]"):
        assert_same(ours, expected, "y")
    with pytest.raises(AssertionError, match=r"dx: error 1, .* \[0-3 of 4; 32-63 of 64\]"):
        assert_as_accurate_as_torch(ours, expected, expected.double(), "dx")
    assert_same(expected, expected.clone())
    with pytest.raises(AssertionError, match="1 NaN"):
        assert_same(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
