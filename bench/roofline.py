"""`python -m bench.roofline RESULT.json`: how well the roofline predicts the convolutions of a result of `bench.gpu`.

The roofline (tdc_fast/pruning/latency/roofline.py) estimates the time of layers for budgets in time where no table was
measured. Of the result it takes the forward rows of even groups, in CUDA graphs, and prints for every width how many
there are, the rank correlation of estimate and measurement, and the median error up to a constant factor, as budgets
are shares of a model's own time.

    python -m bench.roofline bench/results/gpu-nvidia-h200.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.files import markdown_rows, read_result
from bench.gpu.conv import live_channels
from bench.gpu.rows import OURS_GRAPH, Row
from tdc_fast.errors import invalid
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.pruning.latency import Layer, Roofline, Setting
from tdc_fast.pruning.latency.timing import median_error, rank_correlation

SHARED_LIMIT = {"8.0": 166912, "9.0": 232448}  # bytes that a program may use, by compute capability
LAYER = re.compile(r"B(?P<batch>\d+) (?P<inputs>\d+)-(?P<outputs>\d+) (?P<height>\d+)x(?P<width>\d+) (?P<taps>\d+)x")


def main(arguments: list[str] | None = None) -> int:
    """Print the table.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, or 2 when the result has no such rows or is of a device without a roofline.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.partition("\n\n")[0])
    parser.add_argument("result", type=Path, help="JSON file that bench.gpu wrote")
    try:
        print("\n".join(table_of(read_result(parser.parse_args(arguments).result))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table_of(result: dict[str, Any]) -> list[str]:
    """The lines of the table.

    Args:
        result: of `bench.gpu`.

    Raises:
        ValueError: it has no such rows, or is of a device without a roofline.
    """
    described = result["device"]
    capability = described.get("capability")
    if capability not in SHARED_LIMIT:
        raise invalid("device", described["name"], f"one of compute capability {' or '.join(SHARED_LIMIT)}")
    arch = int(capability.replace(".", ""))
    gpu = Device(arch, described["multiprocessors"], SHARED_LIMIT[capability], described["name"])
    rows = [row for row in result["rows"] if _counts(row)]
    if not rows:
        raise invalid("result", "no rows", "forward rows of convolutions in CUDA graphs")

    def estimate(row: Row) -> int:
        batch, layer = layer_of(row)
        return Roofline(Setting(gpu.name, result["dtype"], batch, row["num_groups"]), gpu).nanoseconds(layer)

    def line(name: str, some: Sequence[Row]) -> tuple[str, ...]:
        predicted, measured = [estimate(row) for row in some], [1e6 * row["ms"][OURS_GRAPH] for row in some]
        error = median_error(predicted, measured)
        return name, str(len(some)), f"{rank_correlation(predicted, measured):.3f}", f"{error:.1%}"

    widths = sorted({row["width"] for row in rows}, reverse=True)
    lines = [line(f"{width:.0%}", [row for row in rows if row["width"] == width]) for width in widths]
    return markdown_rows(("width", "rows", "rank correlation", "median error"), [*lines, line("all", rows)])


def layer_of(row: Row) -> tuple[int, Layer]:
    """The batch and the layer of a row."""
    found = LAYER.search(row["layer"])
    if found is None:
        raise invalid("layer", row["layer"], "a convolution as bench.gpu names it")
    taps, step = row["filter"], row["stride"]
    layer = Layer(
        "conv2d",
        in_channels := int(found["inputs"]),
        out_channels := int(found["outputs"]),
        int(found["height"]),
        int(found["width"]),
        live_channels(in_channels, row["width"]),
        live_channels(out_channels, row["width"]),
        filter=(taps, taps),
        stride=(step, step),
        padding=(taps // 2, taps // 2),
    )
    return int(found["batch"]), layer


def _counts(row: Row) -> bool:
    if row["section"] != "conv" or row["direction"] != "forward" or "failed" in row:
        return False
    if row["uneven"] or row.get("mixed"):
        return False
    return OURS_GRAPH in row["ms"] and not row["wrong"]


if __name__ == "__main__":
    sys.exit(main())
