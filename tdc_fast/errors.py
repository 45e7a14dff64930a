"""The two ways in which tdc_fast tells a caller what is wrong."""

from __future__ import annotations

import importlib
from types import ModuleType


def invalid(argument: str, value: object, remedy: str) -> ValueError:
    """Returns (does not raise) the ValueError for a bad argument.

    Args:
        argument: the argument's name as the caller wrote it.
        value: what it was; shown by its ``repr``, cut to one readable line.
        remedy: what it should be, or what to do, as a clause that follows "expected".
    """
    shown = " ".join(repr(value).split())
    if len(shown) > 160:
        shown = shown[:157] + "..."
    return ValueError(f"{argument}: got {shown}; expected {remedy}")


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: dotted name, such as ``"matplotlib.pyplot"``.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: naming the extra, when the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"{name} is needed here: pip install 'tdc_fast[{extra}]' ({error})") from error
