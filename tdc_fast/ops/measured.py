"""Measured times of the GPU backends, from which the dispatcher knows which one is the fastest.

`bench/backend_times.py` writes them from a result of `bench.gpu` to kernels/tuned/<device>.backends.json:

    {"device": "NVIDIA H200", "date": ..., "command": ..., "versions": {...},
     "kernels": {"routed_group_norm": 1, ...}, "rows": [
      {"op": "routed_group_norm", "dtype": "bfloat16", "batch": 64, "pixels": 4096, "channels": 256,
       "ms": {"cuda": 0.32243, "triton": 0.20390}}, ...
      {"op": "routed_conv2d_wgrad", "dtype": "bfloat16", "filter": 3, "stride": 1, "batch": 64, "pixels": 1024,
       "in_channels": 128, "out_channels": 128, "num_groups": 8, "ms": {...}}, ...]}

`kernels` are the versions of the kernels that were measured, see KERNEL_VERSIONS.

A row says something about problems of the same operator, dtype, filter and stride (of a group norm: the same operator
and dtype) whose every size is at most twice and at least half its own. Sizes are the batch, the pixels of an input
image, channels, and for convolutions the groups. Of the rows that apply, the nearest ones count: those with the least
sum of |log2(size / size of the row)|. Where several are equally near, such as the same norm with and without SiLU,
their means count. Padding, live widths and epilogues are not looked at, and x and x2 are one input. Nothing is said
about convolutions of an upsampled image: backends compute them in ways of their own (triton with merged taps, 4/9 of
the products), so the time of a convolution of the larger image does not tell which is the fastest.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.problems import ConvProblem, Problem

# By operator, and by the part of it that `_version_of` tells apart. Raise one when its kernels change so much that
# another backend may be the fastest: rows of a table that were measured with another version are ignored.
KERNEL_VERSIONS: Mapping[str, int] = {
    "routed_conv2d": 1,
    "routed_conv2d_dgrad": 1,
    "routed_conv2d_wgrad": 2,
    "routed_group_norm": 3,
    "routed_group_norm_backward": 3,
    **dict.fromkeys([f"routed_conv2d{which}, few channels" for which in ("", "_dgrad", "_wgrad")], 2),
}
GAIN = 0.98  # another backend comes first if it takes at most this fraction of the usual one's time: less is noise
_FEW = 7  # channels of an image at most, for which `cuda` has kernels of its own
_FARTHEST = 1.0  # in octaves, by which each size of a problem may differ from a row's

Kind = tuple[Any, ...]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Measured times near a problem.

    Attributes:
        device: the driver's name of the device.
        date: of the measurement.
        shape: sizes of the nearest rows, in words.
        ms: milliseconds by backend.
    """

    device: str
    date: str
    shape: str
    ms: Mapping[str, float]

    def order(self, usual: Sequence[str]) -> tuple[str, ...]:
        """The usual order of backends, with the measured ones among themselves in the order of their times.

        Args:
            usual: names, fastest first. It stays as it is if the first measured one is the fastest, or loses by less
                than 2 percent.
        """
        timed = [name for name in usual if name in self.ms]
        ranked = sorted(timed, key=self.ms.__getitem__)
        if not timed or self.ms[ranked[0]] > GAIN * self.ms[timed[0]]:
            return tuple(usual)
        fastest = iter(ranked)
        return tuple(next(fastest) if name in self.ms else name for name in usual)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.4f} ms" for name, ms in sorted(self.ms.items(), key=lambda item: item[1]))
        return f"measured on {self.device}, {self.date}, at {self.shape}: {times}"


def times_near(problem: Problem) -> Times | None:
    """The measured times nearest to a problem; None where its device has no table or nothing near was measured.

    None too for an upsampled image.
    """
    if "upsample" in problem.fused:
        return None
    name = device_name(problem.device)
    table = load_times(name) if name else None
    if table is None:
        return None
    kind, sizes = _described(problem)
    near: dict[float, list[tuple[Sizes, Mapping[str, float]]]] = {}
    for measured, ms in table.rows.get(kind, ()):
        octaves = [abs(math.log2(size / other)) for size, other in zip(sizes, measured, strict=True) if size]
        if len(octaves) == len(sizes) and max(octaves) <= _FARTHEST:
            near.setdefault(round(sum(octaves), 6), []).append((measured, ms))
    if not near:
        return None
    nearest = near[min(near)]
    common = set.intersection(*(set(ms) for _, ms in nearest))
    means = {backend: statistics.fmean(ms[backend] for _, ms in nearest) for backend in sorted(common)}
    shapes = dict.fromkeys(_in_words(sizes) for sizes, _ in nearest)
    return Times(name, table.date, " and ".join(shapes) + (", on average" if len(shapes) > 1 else ""), means)


def device_name(device: torch.device) -> str:
    """The driver's name of a GPU; "" for other devices, and for a GPU that is not there."""
    return tile_shapes.device_of(device).name if device.type == "cuda" and torch.cuda.is_available() else ""


@dataclass(frozen=True)
class Table:
    """The measurements of a device.

    Attributes:
        date: when they were made.
        rows: sizes and milliseconds by backend, by kind of problem.
    """

    date: str
    rows: Mapping[Kind, Sequence[tuple[Sizes, Mapping[str, float]]]]


@functools.cache
def load_times(name: str) -> Table | None:
    """The table of a device, of rows measured with the KERNEL_VERSIONS; None if there is none.

    Args:
        name: the driver's name of the device.
    """
    path = tile_shapes.TUNED / file_name(name)
    if not path.is_file():
        return None
    table = json.loads(path.read_text())
    versions = table.get("kernels", {})
    rows: dict[Kind, list[tuple[Sizes, Mapping[str, float]]]] = {}
    for row in table["rows"]:
        version = _version_of(row)
        # Tables that do not know of a part of an operator were measured with the first kernels of it.
        if versions.get(version, 1 if version != row["op"] else None) != KERNEL_VERSIONS.get(version):
            continue
        kind: Kind
        sizes: Sizes
        if "filter" in row:
            taps, stride = (row["filter"],) * 2, (row["stride"],) * 2
            kind = (row["op"], row["dtype"], taps, stride)
            sizes = (row["batch"], row["pixels"], row["in_channels"], row["out_channels"], row["num_groups"])
        else:
            kind, sizes = (row["op"], row["dtype"]), (row["batch"], row["pixels"], row["channels"])
        rows.setdefault(kind, []).append((sizes, row["ms"]))
    return Table(table["date"], rows)


def file_name(device_name: str) -> str:
    """Name of a device's table in kernels/tuned: "nvidia_h200.backends.json"."""
    return f"{tile_shapes.table_name(device_name)}.backends.json"


def _version_of(row: Mapping[str, Any]) -> str:
    """The key in KERNEL_VERSIONS of the kernels that a row was measured with."""
    few = f"{row['op']}, few channels"
    return few if few in KERNEL_VERSIONS and min(row["in_channels"], row["out_channels"]) <= _FEW else row["op"]


def _described(p: Problem) -> tuple[Kind, Sizes]:
    dtype = str(p.dtype).removeprefix("torch.")
    pixels = p.height * p.width
    if isinstance(p, ConvProblem):
        return (p.op, dtype, p.filter, p.stride), (p.batch, pixels, p.in_channels, p.out_channels, p.num_groups)
    return (p.op, dtype), (p.batch, pixels, p.channels)


def _in_words(sizes: Sizes) -> str:
    batch, pixels, *channels = sizes
    if len(channels) == 1:
        return f"{batch} images of {pixels} pixels, {channels[0]} channels"
    return f"{batch} images of {pixels} pixels, {channels[0]} to {channels[1]} channels, {channels[2]} groups"
