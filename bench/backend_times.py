"""`python -m bench.backend_times RESULT.json`: the times of the GPU backends, from a result of `bench.gpu`.

It writes kernels/tuned/<device>.backends.json, from which the dispatcher takes the fastest backend of a call
(tdc_fast/ops/measured.py, which describes the file). Of the result it takes the rows of single layers at full width
with even groups, for which more than one backend was timed in a CUDA graph. Times are rounded to 10 ns.

    python -m bench.gpu --out bench/results                  # on the device
    python -m bench.backend_times bench/results/gpu-nvidia-h200.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.files import ROOT, read_result
from bench.gpu.rows import OURS_GRAPH, Row
from tdc_fast.atomic import write_bytes
from tdc_fast.errors import invalid
from tdc_fast.ops.measured import file_name

BACKENDS = ("cuda", "hopper", "triton")
OPERATORS = {
    ("conv", "forward"): "routed_conv2d",
    ("conv", "dgrad"): "routed_conv2d_dgrad",
    ("conv", "wgrad"): "routed_conv2d_wgrad",
    ("group norm", "forward"): "routed_group_norm",
    ("group norm", "backward"): "routed_group_norm_backward",
}
CONV = re.compile(r"B(?P<batch>\d+) (?P<in_channels>\d+)-(?P<out_channels>\d+) (?P<height>\d+)x(?P<width>\d+) ")
NORM = re.compile(r"B(?P<batch>\d+) C(?P<channels>\d+) (?P<height>\d+)x(?P<width>\d+)\b")


def main(arguments: list[str] | None = None) -> int:
    """Write the table of a result.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 2 when the result is no measurement of bench.gpu or times no two backends.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.backend_times", description=__doc__.partition("\n\n")[0])
    parser.add_argument("result", type=Path, help="JSON file that bench.gpu wrote")
    folder = ROOT / "kernels" / "tuned"
    parser.add_argument("--out", type=Path, default=folder, help="folder of the table (default: kernels/tuned)")
    options = parser.parse_args(arguments)
    try:
        table = table_of(read_result(options.result))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / file_name(table["device"])
    write_bytes(path, as_text(table).encode())
    print(f"written: {path} ({len(table['rows'])} rows)")
    return 0


def table_of(result: dict[str, Any]) -> dict[str, Any]:
    """The table of a result.

    Args:
        result: what bench.gpu wrote.

    Raises:
        ValueError: it is a dry run, is in fp32 (whose rows do not say whether tf32 was allowed), or has no such rows.
    """
    if result["dry_run"]:
        raise invalid("result", "a dry run", "times of a GPU")
    if result["dtype"] == "float32":
        raise invalid("result", "times in float32", "a result in bfloat16 or float16")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in result["rows"]:
        found = row_of(row, result["dtype"])
        if found is not None:
            rows.setdefault((row["layer"], found["op"], row["num_groups"]), found)  # measured twice: the first time
    if not rows:
        raise invalid("result", "no layer timed on several backends", "sections norm and conv")
    return {
        "device": result["device"]["name"],
        "date": result["date"],
        "command": result["command"],
        "versions": result["versions"],
        "kernels": result.get("kernels", dict.fromkeys(OPERATORS.values(), 1)),  # the first results do not say
        "rows": list(rows.values()),
    }


def row_of(row: Row, dtype: str) -> dict[str, Any] | None:
    """The row of the table that a row of the result gives; None for one that says nothing about backends."""
    op = OPERATORS.get((row["section"], row["direction"]))
    if op is None or "failed" in row or row["wrong"] or row["width"] != 1.0 or row.get("uneven"):
        return None
    times = {name: row["ms"].get(f"{name}, graph") for name in BACKENDS}
    times[row["backend"]] = row["ms"].get(OURS_GRAPH)
    ms = {name: round(time, 5) for name, time in sorted(times.items()) if time is not None and name in BACKENDS}
    if len(ms) < 2:
        return None
    layer = (CONV if row["section"] == "conv" else NORM).search(row["layer"])
    if layer is None:
        raise invalid("layer", row["layer"], "a layer as bench.gpu writes it")
    sizes = {name: int(value) for name, value in layer.groupdict().items()}
    shape = {"batch": sizes.pop("batch"), "pixels": sizes.pop("height") * sizes.pop("width"), **sizes}
    if row["section"] == "conv":
        kind = {"op": op, "dtype": dtype, "filter": row["filter"], "stride": row["stride"]}
        return {**kind, **shape, "num_groups": row["num_groups"], "ms": ms}
    return {"op": op, "dtype": dtype, **shape, "ms": ms}


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON with a row per line."""
    head = {key: value for key, value in table.items() if key != "rows"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
