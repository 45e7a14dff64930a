"""The native module, `tdc_fast._native`, which a pure-Python install lacks.

`native.module` is the module, or None; `native.why_missing` then says why, in the words that `explain` shows.
"""

from __future__ import annotations

from typing import Any

module: Any = None
why_missing = ""
try:
    from tdc_fast import _native

    module = _native
except ImportError as error:
    why_missing = f"the native module is not there ({error}); install with TDC_FAST_BUILD=cpu to see why"
