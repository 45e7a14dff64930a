"""Command lines from documented dataclasses, in the syntax of improved-diffusion: `--use_ddim True`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tdc_fast.errors import invalid, require

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def parse_flags(
    sections: Mapping[str, type],
    argv: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    prog: str,
    description: str,
) -> dict[str, Any]:
    """The values of all flags, flat, by name.

    sections: heading in `--help` -> frozen dataclass whose fields are the flags and whose field docstrings are
        their help. Dashes and underscores are the same, `--flag=value` works, booleans are values.
    defaults: values that replace the dataclasses' own defaults.
    Raises ValueError for a boolean that is none; SystemExit for `--help` and for flags that do not exist.
    """
    tyro = require("tyro", "demo")
    fields = [(name, kind, dataclasses.field(default_factory=kind)) for name, kind in sections.items()]
    flags = dataclasses.make_dataclass("Flags", fields)
    start = flags(**{name: kind(**_of_section(kind, defaults)) for name, kind in sections.items()})
    parsed = tyro.cli(
        flags,
        args=_normalised(argv, sections),
        default=start,
        prog=prog,
        description=description,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    values: dict[str, Any] = {}
    for name in sections:
        values.update(dataclasses.asdict(getattr(parsed, name)))
    return values


def value_of(argv: Sequence[str], flag: str) -> str:
    """The value of a flag that must be known before the rest is parsed; "" where it is not given."""
    value = ""
    for position, token in enumerate(argv):
        name, equals, rest = token.partition("=")
        if name.replace("-", "_") == "__" + flag:
            value = rest if equals else (argv[position + 1] if position + 1 < len(argv) else "")
    return value


def use_threads(count: int) -> None:
    """Set torch's CPU threads; 0 leaves them. ValueError for a negative count."""
    if count < 0:
        raise invalid("num_threads", count, "0 or a number above it")
    if count:
        torch.set_num_threads(count)


def _of_section(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _normalised(argv: Sequence[str], sections: Mapping[str, type]) -> list[str]:
    booleans = {
        name for kind in sections.values() for name, hint in typing.get_type_hints(kind).items() if hint is bool
    }
    tokens = split_tokens(argv)
    for position in range(1, len(tokens)):
        flag = tokens[position - 1]
        if flag.startswith("--") and flag[2:] in booleans and not tokens[position].startswith("--"):
            tokens[position] = boolean_word(flag, tokens[position])
    return tokens


def split_tokens(argv: Sequence[str]) -> list[str]:
    """argv with underscores in flags' names, and `--flag=value` as two tokens."""
    tokens: list[str] = []
    for token in argv:
        flag, equals, value = token.partition("=")
        if not token.startswith("--"):
            tokens.append(token)
            continue
        tokens.append("--" + flag[2:].replace("-", "_"))
        if equals:
            tokens.append(value)
    return tokens


def boolean_word(flag: str, text: str) -> str:
    """The word True or False for any of improved-diffusion's spellings; ValueError naming the flag for another word."""
    if text.lower() in _TRUE:
        return "True"
    if text.lower() in _FALSE:
        return "False"
    raise invalid(flag, text, "True or False")
