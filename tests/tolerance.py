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
    assert error <= allowed, (
        f"{what}: error {error:.3g}, allowed {allowed:.3g} (twice torch's, plus rounding); "
        f"{places(ours, exact, allowed)}"
    )


def assert_same(ours: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal in every element; NaN equals nothing."""
    assert ours.shape == expected.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(ours, expected), f"{what}: {places(ours, expected, 0.0)}"


def places(ours: Tensor, expected: Tensor, allowed: float) -> str:
    """How many elements differ by more than `allowed` or are NaN, in which indices of each dimension, and the first."""
    ours, expected = ours.detach().double().cpu(), expected.detach().double().cpu()
    wrong = ~((ours - expected).abs() <= allowed)
    at = wrong.nonzero()
    if not len(at):
        return "no element is wrong"
    first = tuple(at[0].tolist())
    indices = [f"{_ranges(at[:, d].unique().tolist())} of {size}" for d, size in enumerate(wrong.shape)]
    return (
        f"{len(at)} of {wrong.numel()} elements are wrong ({int(ours.isnan().sum())} NaN), in dimensions "
        f"[{'; '.join(indices)}]; first {first}: {ours[first].item():.6g}, expected {expected[first].item():.6g}"
    )


def _ranges(indices: list[int], most: int = 4) -> str:
    """Ascending numbers as ranges, such as "0-3, 8"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    texts = [f"{low}-{high}" if high > low else str(low) for low, high in ranges]
    return ", ".join(texts[:most]) + (f", ... ({len(indices)})" if len(texts) > most else "")
