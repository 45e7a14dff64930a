"""Reading of JSON and YAML that may come from anyone: bounded in size, in depth and in what it expands to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tdc_fast.errors import brief, invalid

JSON_BYTES = 2**28
YAML_BYTES = 2**18
"""YAML is parsed in Python, about a megabyte in ten seconds, and nobody writes more of it by hand."""
MAX_DEPTH = 64
MAX_VALUES = 100_000
"""Values in a YAML file, counted again wherever an alias repeats them."""
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""What YAML 1.1 reads as a number of base 8 or 60, though no letter says so: 010 is 8, and 1:30 is 90."""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, too large, not UTF-8, or not JSON.
    """
    return parse_json(_read_text(path, JSON_BYTES))


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run or a command wrote.

    Raises:
        ValueError: the file is missing, cannot be read, or holds something else; names it.
    """
    try:
        value = read_json(path)
    except (ValueError, OSError) as error:
        raise invalid(path.name, str(path), f"the file as it was written; it does not parse: {error}") from error
    if not isinstance(value, dict):
        raise invalid(path.name, str(path), f"the file as it was written, an object; it holds {brief(value)}")
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python's parser follows.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, too large, not UTF-8, not YAML, too deep, has a key twice or a number such as
            010, or its aliases repeat too much.
    """
    import yaml

    text = _read_text(path, YAML_BYTES)
    try:
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
            if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _OTHER_BASE.fullmatch(event.value):
                number = brief(yaml.safe_load(event.value))
                raise ValueError(
                    f"it has {event.value[:40]}, which YAML reads as {number}: write the number in decimal, without "
                    "a 0 in front, or put text in quotes"
                )
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    _refuse_bombs(value)
    return value


def _read_text(path: Path, limit: int) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return content.decode("utf-8")


def _refuse_repeated_keys(node: Any) -> None:
    """Refuse a top-level mapping, which is all that options are, where a key stands twice: the last one would win."""
    seen = set()
    for key, _ in node.value if getattr(node, "id", "") == "mapping" else ():
        if isinstance(key.value, str):
            if key.value in seen:
                raise ValueError(f"it has {brief(key.value)} twice")
            seen.add(key.value)


def _refuse_bombs(value: Any) -> None:
    """Refuse a value in which aliases repeat collections too often, or one within itself."""
    pending = [value]
    for _ in range(MAX_VALUES):
        if not pending:
            return
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, (list, tuple, set)):
            pending += item
    raise ValueError(f"its aliases expand to more than {MAX_VALUES} values")
