"""The files that a bench writes: their folder, their names, and rows of Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def slug(text: str) -> str:
    """`text` as part of a file name: lower-case letters and digits, joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def write_results(results: dict[str, Any], table: str, folder: Path, name: str) -> None:
    """Writes all results to FOLDER/NAME.json and the Markdown table to FOLDER/NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)


def markdown_rows(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [list(header), *map(list, rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return ["| " + " | ".join(line) + " |" for line in cells]
