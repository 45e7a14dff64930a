"""Loads the native module, `tdc_fast._native`, which a pure-Python install lacks.

`native.module` is the module, or None; `native.why_missing` then holds the reason that `explain` shows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

module: Any = None
why_missing = ""
try:
    from tdc_fast import _native

    module = _native
except ImportError as error:
    why_missing = f"the native module is not there ({error}); install with TDC_FAST_BUILD=cpu to see why"


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Any) -> dict[str, int]:
    """The addresses of a named tuple's tensors, by field name."""
    return {name: 0 if t is None else t.data_ptr() for name, t in zip(tensors._fields, tensors, strict=True)}
