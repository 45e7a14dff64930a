"""Limits of options, declared with each as `Annotated[int, Within(1, 64)]` or `PathText`, and checked in one place."""

from __future__ import annotations

import functools
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from tdc_fast.errors import invalid

MAX_TEXT = 100_000
"""Characters of the longest text that an option takes; the boundaries of a thousand groups are about 5000."""


@dataclass(frozen=True)
class Within:
    """The range of a number.

    Attributes:
        low: the smallest value.
        high: the largest; generous, so that only what no machine can hold is refused.
    """

    low: float
    high: float = math.inf

    @property
    def words(self) -> str:
        """The range as an error message says it."""
        words = f"at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
        return f"a number {words}"


@dataclass(frozen=True)
class AsPath:
    """Marks a text that names a file or a folder."""


PathText = Annotated[str, AsPath()]
"""The type of an option that names a file or a folder."""


def check_path(argument: str, text: str) -> None:
    """Refuse a name that no system has for a file, before anything looks for it.

    Args:
        argument: its name, for errors.
        text: the path.

    Raises:
        ValueError: a NUL or half a surrogate pair is in it, or a part of it is too long.
    """
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise invalid(argument, text, "a path of whole characters") from error
    if b"\0" in name or any(len(part) > 255 for part in name.split(b"/")) or len(name) > 4095:
        raise invalid(argument, text, "a path without NUL of at most 4095 bytes, with at most 255 between slashes")


@functools.cache
def _limits(options: type) -> dict[str, Within | AsPath]:
    hints = typing.get_type_hints(options, include_extras=True)
    found = ((name, part) for name, hint in hints.items() for part in getattr(hint, "__metadata__", ()))
    return {name: part for name, part in found if isinstance(part, (Within, AsPath))}


def path_options(options: type) -> list[str]:
    """The names of the options that name files or folders.

    Args:
        options: the dataclass that declares the options.
    """
    return [name for name, limit in _limits(options).items() if isinstance(limit, AsPath)]


def check_limits(options: type, values: Mapping[str, Any]) -> None:
    """Check the values of options against what their declarations say.

    Args:
        options: the dataclass that declares the options.
        values: the values by name; further names are ignored.

    Raises:
        ValueError: naming the first option that is out of its range, or a text that is too long or has a NUL in it.
    """
    for name, limit in _limits(options).items():
        if name in values and isinstance(limit, AsPath):
            check_path(name, values[name])
        elif name in values and isinstance(limit, Within) and not limit.low <= values[name] <= limit.high:
            raise invalid(name, values[name], limit.words)
    for name in typing.get_type_hints(options):
        value = values.get(name)
        if isinstance(value, str) and ("\0" in value or len(value) > MAX_TEXT):
            raise invalid(name, value, f"text of at most {MAX_TEXT} characters, none of them NUL")


def comma_numbers(name: str, text: str, kind: type) -> list[Any]:
    """The numbers of a comma list such as `"16,8"`.

    Args:
        name: the flag, for errors.
        text: the list.
        kind: int or float.

    Raises:
        ValueError: an entry is not a finite number; names the flag.
    """
    try:
        numbers = [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise invalid(name, text, f"a comma list of {kind.__name__} values") from error
    if not all(map(math.isfinite, numbers)):
        raise invalid(name, text, "finite numbers")
    return numbers
