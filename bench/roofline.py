"""`python -m bench.roofline RESULT.json`: how well the roofline predicts the convolutions of a result of `bench.gpu`.

The roofline (tdc_fast/pruning/latency/roofline.py) estimates the time of layers for budgets in time where no table was
measured. Of the result it takes the forward rows of even groups, in CUDA graphs. Each time is predicted in the form
that its backend ran in on the device of the result: in the Hopper form where the backend `hopper` had it for the layer,
else on Triton's tiles. For every backend, form and width it prints how many times there are, the rank correlation of
estimate and measurement, and the median error up to a constant factor, as budgets are shares of a model's own time.

    python -m bench.roofline bench/results/gpu-nvidia-h200.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.files import markdown_rows, read_result
from bench.gpu.conv import live_channels
from bench.gpu.rows import OURS_GRAPH, Row
from tdc_fast.errors import invalid
from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.ops import hopper, native
from tdc_fast.pruning.latency import Layer, Roofline, Setting
from tdc_fast.pruning.latency.timing import median_error, rank_correlation

SHARED_LIMIT = {"8.0": 166912, "9.0": 232448}  # bytes that a program may use, by compute capability
HOPPER_GRAPH = f"{hopper.name}, graph"
HOPPER, TRITON = "Hopper form", "Triton's tiles"
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
    times = [time for row in result["rows"] if _counts(row) for time in times_of(row, result["dtype"], gpu)]
    if not times:
        raise invalid("result", "no rows", "forward rows of convolutions in CUDA graphs")
    lines = []
    for kind in dict.fromkeys((time.backend, time.form) for time in times):
        some = [time for time in times if (time.backend, time.form) == kind]
        for width in sorted({time.width for time in some}, reverse=True):
            lines.append((*kind, f"{width:.0%}", *_quality([time for time in some if time.width == width])))
        lines.append((*kind, "all", *_quality(some)))
    return markdown_rows(("backend", "predicted", "width", "times", "rank correlation", "median error"), lines)


@dataclass(frozen=True)
class Time:
    """A measured time and its prediction.

    Attributes:
        backend: that ran.
        form: that the prediction is for.
        width: the share of the channels that is live.
        predicted: nanoseconds.
        measured: nanoseconds.
    """

    backend: str
    form: str
    width: float
    predicted: int
    measured: float


def times_of(row: Row, dtype: str, gpu: Device) -> list[Time]:
    """The time of a row's own backend, and that of `hopper` where it was measured beside it.

    Args:
        row: of a convolution.
        dtype: of its tensors.
        gpu: the device that it was measured on.

    Raises:
        ValueError: the backend `hopper` ran, and the native module, which knows its forms, is not built here.
    """
    batch, layer = layer_of(row)
    setting = Setting(gpu.name, dtype, batch, row["num_groups"])
    measured = {row["backend"]: row["ms"][OURS_GRAPH]}
    if HOPPER_GRAPH in row["ms"]:
        measured[hopper.name] = row["ms"][HOPPER_GRAPH]
    found = []
    for backend, ms in measured.items():
        model = Roofline(setting, gpu, is_hopper=_in_hopper_form(gpu) if backend == hopper.name else None)
        form = HOPPER if model.in_hopper_form(layer) else TRITON
        found.append(Time(backend, form, row["width"], model.nanoseconds(layer), 1e6 * ms))
    return found


def _in_hopper_form(gpu: Device) -> Callable[[ConvProblem], bool]:
    if native.module is None:
        raise invalid(
            "result", "times of the backend 'hopper'", f"the native module to predict them ({native.why_missing})"
        )
    facts = gpu.arch, gpu.multiprocessors, gpu.shared_limit
    return lambda problem: hopper.form_of_conv(problem, facts) == hopper.HOPPER_FORM


def _quality(times: Sequence[Time]) -> tuple[str, ...]:
    """How many times there are, their rank correlation and their median error."""
    predicted, measured = [time.predicted for time in times], [time.measured for time in times]
    return str(len(times)), f"{rank_correlation(predicted, measured):.3f}", f"{median_error(predicted, measured):.1%}"


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
