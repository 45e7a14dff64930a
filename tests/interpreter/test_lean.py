"""The shortened interpreter still refuses what integers cannot hold."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic_kernel(x, y, out, operation: tl.constexpr, size: tl.constexpr):
    at = tl.arange(0, size)
    left, right = tl.load(x + at), tl.load(y + at)
    if operation == "add":
        result = left + right
    elif operation == "sub":
        result = left - right
    else:
        result = left * right
    tl.store(out + at, result)


@pytest.mark.parametrize(
    ("operation", "fits", "overflows"),
    [
        ("add", (2**31 - 2, 1, 2**31 - 1), (2**31 - 1, 1)),
        ("sub", (1 - 2**31, 1, -(2**31)), (-(2**31), 1)),
        ("mul", (2**15, -(2**16), -(2**31)), (2**15, 2**16)),
    ],
)
def test_an_integer_that_overflows_is_an_error(
    operation: str, fits: tuple[int, int, int], overflows: tuple[int, int]
) -> None:
    """One element of four, and only if it is beyond the last number that fits."""
    out = torch.zeros(4, dtype=torch.int32)

    def run(left: int, right: int) -> None:
        x, y = (torch.tensor([0, 0, value, 1], dtype=torch.int32) for value in (left, right))
        arithmetic_kernel[(1,)](x, y, out, operation, 4)

    run(*fits[:2])
    assert out[2] == fits[2]
    with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
        run(*overflows)
