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


def rounding_floor(dtype: torch.dtype, exact: Tensor) -> float:
    """Two units in the last place of the largest exact value: what remains when torch happens to be exact."""
    largest = exact.detach().abs().max().item() if exact.numel() else 0.0
    return 2 * torch.finfo(dtype).eps * largest


def assert_as_accurate_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "result") -> None:
    """`ours` and `torchs` are low-precision results of one dtype, `exact` the fp64 reference on the same inputs."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torchs.dtype, f"{what}: dtype {ours.dtype}, expected {torchs.dtype}"
    error, allowed = max_error(ours, exact), 2 * max_error(torchs, exact) + rounding_floor(ours.dtype, exact)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (twice torch's, plus rounding)"
