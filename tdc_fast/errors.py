"""How tdc_fast reports a bad argument and a missing package, what counts as an integer, and memory that ran out."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from numbers import Integral
from types import ModuleType
from typing import TypeGuard

_SHOWN = 160
_LARGEST_INT32 = 2**31 - 1
_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("{", "}"),
}


def invalid(argument: str, value: object, remedy: str) -> ValueError:
    """Return (not raise) the ValueError for a bad argument.

    Args:
        argument: its name, as the caller wrote it.
        value: its value; the message shows the `repr`, shortened to one line.
        remedy: what it should be, or what to do: the message continues with it after "expected".
    """
    return ValueError(f"{_cut(argument)}: got {brief(value)}; expected {remedy}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python or numpy. A bool, a whole float and a tensor are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def integer(argument: str, value: object, least: int = 1, most: int = _LARGEST_INT32) -> int:
    """Returns a count or an index that a caller gave, as a Python int.

    Args:
        argument: its name, as the caller wrote it.
        value: what `is_integer` accepts.
        least: the smallest value allowed.
        most: the largest value allowed.

    Raises:
        ValueError: it is no integer, or out of range.
    """
    if is_integer(value) and least <= value <= most:
        return int(value)
    too_large = is_integer(value) and value > most
    wanted = f"from {least} to {most}" if too_large or most != _LARGEST_INT32 else f"of at least {least}"
    raise invalid(argument, value, f"an integer {wanted}")


def brief(value: object) -> str:
    """The `repr` of a value on one line of at most 160 characters.

    What would be cut off is not formatted: a value from a file can be as deep as its parser allows, and a few hundred
    bytes of YAML with anchors are a list of more elements than the memory holds.
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > 2 * _SHOWN:  # white space may shrink
            break
    return _cut(" ".join(text.split()))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _pieces(value: object) -> Iterator[str]:
    """The `repr` of a value, piece by piece; every level of nesting has a piece before the next level begins."""
    kind = type(value)
    if isinstance(value, (list, tuple, dict, set, frozenset)) and kind in _BRACKETS and (value or kind in (list, dict)):
        opening, closing = _BRACKETS[kind]
        yield opening
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item)
            if isinstance(value, dict):
                yield ": "
                yield from _pieces(value[item])
        yield f",{closing}" if kind is tuple and len(value) == 1 else closing
    elif isinstance(value, (str, bytes)):
        yield repr(value[: 2 * _SHOWN])
    elif isinstance(value, int) and value.bit_length() > 4 * _SHOWN:
        yield f"an integer of {value.bit_length()} bits"  # Python refuses to print the longest
    else:
        yield repr(value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed: Python's, numpy's or torch's, on the CPU or a GPU."""
    words = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


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
