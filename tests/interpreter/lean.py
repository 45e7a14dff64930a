"""Triton's interpreter without what it does again at every call, which is most of its time in tiny problems.

It prepares triton.language for every call of a device function, looks up a type for every value, and checks integer
sums and products for overflow by some twenty operations on wrapped arrays. What it checks stays checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core  # noqa: F401  what is prepared are the modules among the globals of this file
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def make_lean() -> None:
    """Prepares triton.language once, for the rest of this process, and keeps and shortens what is repeated."""
    interpreter._patch_lang(make_lean)
    nothing_to_restore = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda function: nothing_to_restore
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    TritonSemantic.binary_op_sanitize_overflow_impl = refuse_overflow


def by_name(function: Callable[[tl.dtype], Any]) -> Callable[[tl.dtype], Any]:
    """A function of a type that computes once for every name of a type. Types of pointers cannot be hashed."""
    made: dict[str, Any] = {}

    def kept(of_type: tl.dtype) -> Any:
        if of_type.name not in made:
            made[of_type.name] = function(of_type)
        return made[of_type.name]

    return kept


def refuse_overflow(semantic: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, operation: Callable[..., Any]) -> None:
    """Fails if the result of an operation on integers of less than 64 bits does not fit their type."""
    integer = lhs.type.scalar
    assert integer == rhs.type.scalar and integer.is_int()
    if integer.int_bitwidth < 64:
        exact = OPERATIONS[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        fits = integer.get_int_min_value() <= exact.min() and exact.max() <= integer.get_int_max_value()
        assert fits, f"int{integer.int_bitwidth} overflow detected for operation {operation.__name__}"
