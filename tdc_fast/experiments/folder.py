"""The folder of an experiment: the same options continue it, others are an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tdc_fast.errors import invalid
from tdc_fast.text_files import read_record


def begun_with(
    record: Path, options: Mapping[str, Any], what: str, kind: type, leftovers: Collection[str] = ()
) -> bool:
    """Whether an experiment with these options has begun in the folder of `record`, which says so.

    Args:
        record: the file of the options, as JSON, that the caller writes when the experiment begins.
        options: the options that decide the numbers.
        what: the experiment, for messages.
        kind: the dataclass of the options, with the defaults that options newer than the record had.
        leftovers: names that may be in the folder before the record is.

    Returns:
        False for a folder that is new or empty.

    Raises:
        ValueError: the folder was begun with other options, or holds something else.
    """
    out = record.parent
    if record.is_file():
        defaults = {field.name: field.default for field in dataclasses.fields(kind) if field.name in options}
        for name, value in {**defaults, **read_record(record)}.items():
            if options.get(name) != value:
                raise invalid(name, options.get(name), f"{value!r}, as in the {what} begun in {out}, or another --out")
        print(f"continuing the {what} in {out}: what is finished is kept")
        return True
    if out.is_dir() and any(path.name not in leftovers for path in out.iterdir()):
        raise invalid("out", str(out), f"a new or empty folder, or that of an earlier {what}")
    return False
