"""The one tolerance of the project: at most twice the error of torch's own operator in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in fp64. NaN anywhere in `actual` counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    error = (actual.detach().double() - exact.detach().double()).abs().max().item()
    return float("inf") if error != error else error


def rounding_floor(dtype: torch.dtype, exact: Tensor, terms: int) -> float:
    """What remains when torch happens to be exact.

    Two units in the last place of the largest exact value, and the random walk of a sum of `terms` products of order
    one (which test inputs are) in the accumulation dtype: a sum that cancels keeps the rounding of its terms.
    """
    largest = exact.detach().abs().max().item() if exact.numel() else 0.0
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return 2 * torch.finfo(dtype).eps * largest + terms**0.5 * torch.finfo(accumulation).eps


def assert_as_accurate_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "result", terms: int = 64
) -> None:
    """`ours` and `torchs` are results of one dtype, `exact` the fp64 reference on the same inputs.

    terms: how many products an element sums.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torchs.dtype, f"{what}: dtype {ours.dtype}, expected {torchs.dtype}"
    error, allowed = max_error(ours, exact), 2 * max_error(torchs, exact) + rounding_floor(ours.dtype, exact, terms)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (twice torch's, plus rounding)"
