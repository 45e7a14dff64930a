"""How tdc_fast reports a bad argument and a missing optional package."""

from __future__ import annotations

import importlib
from types import ModuleType


def invalid(argument: str, value: object, remedy: str) -> ValueError:
    """Return (not raise) the ValueError for a bad argument.

    Args:
        argument: its name, as the caller wrote it.
        value: its value; the message shows the `repr`, shortened to one line.
        remedy: what it should be, or what to do: the message continues with it after "expected".
    """
    shown = " ".join(repr(value).split())
    if len(shown) > 160:
        shown = shown[:157] + "..."
    return ValueError(f"{argument}: got {shown}; expected {remedy}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name, such as `"matplotlib.pyplot"`.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: the module is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f"{name} is needed here: pip install 'tdc_fast[{extra}]' ({error})") from error
