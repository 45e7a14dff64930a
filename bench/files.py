"""The files that a bench reads and writes, rows of Markdown tables, and numbers of its command line."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tdc_fast.atomic import write_bytes, write_json
from tdc_fast.errors import invalid

ROOT = Path(__file__).resolve().parent.parent


def slug(text: str) -> str:
    """`text` as part of a file name: lower-case letters and digits, joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def write_results(results: dict[str, Any], table: str, folder: Path, name: str) -> None:
    """Writes all results to FOLDER/NAME.json and the Markdown table to FOLDER/NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", results)
    write_bytes(folder / f"{name}.md", table.encode())


def read_result(path: Path) -> dict[str, Any]:
    """What `write_results` wrote to a JSON file for bench.gpu.

    Raises:
        ValueError: it cannot be read, or something else wrote it.
    """
    remedy = "a JSON file that bench.gpu wrote"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise invalid("result", path, f"{remedy} ({error})") from error
    if not isinstance(result, dict) or not {"rows", "device", "dtype", "dry_run"} <= result.keys():
        raise invalid("result", path, remedy)
    return result


def whole_number(text: str) -> int:
    """An integer of at least 1, as argparse's `type`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def share(text: str) -> tuple[int, int]:
    """One of equal shares, such as "0/4", the first of four, as argparse's `type`."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: 0/4 is the first of four")
    return int(index), int(count)


def seconds(text: str) -> float:
    """A finite number of at least 0, as argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number from 0 on")
    return value


def device(text: str) -> torch.device:
    """The CPU, or a GPU that is there, as argparse's `type`."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu or cuda") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds no GPU for {text!r}")
    return found


def markdown_rows(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [list(header), *map(list, rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return ["| " + " | ".join(line) + " |" for line in cells]
