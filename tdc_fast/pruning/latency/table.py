"""A table of measured times of layers, in a JSON file that is checked on load. `tdc_fast.latency` measures one.

    {"version": 1, "device": "NVIDIA H200", "dtype": "bfloat16", "batch": 64, "num_groups": 8, "facts": {"date": ...},
     "backends": {"conv2d": ["triton"], "linear": ["triton"], "group_norm": ["cuda"]}, "instruction_set": "",
     "rows": [{"kind": "conv2d", "in_channels": 128, "out_channels": 128, "live_in": 128, "live_out": 96, ...,
               "ns": 41200}, ...]}

A row has the fields of `Layer` and the nanoseconds of one forward. A layer whose live channels were not measured takes
as long as the next wider one that was: of the rows of its full shape with at least as many live channels on both sides,
the nearest counts (the fewest live channels in all; of equally near ones the longer time). So a search gains nothing
from widths that nobody measured. Tables of earlier versions have no "backends" and no "instruction_set" (that of the
CPU kernels; "" on a GPU); those are not checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tdc_fast.atomic import atomic_file
from tdc_fast.errors import invalid
from tdc_fast.ops.backends import ENVIRONMENT
from tdc_fast.pruning.latency.layers import KINDS, MAX_NANOSECONDS, Layer
from tdc_fast.pruning.latency.problems import backends_of
from tdc_fast.pruning.latency.setting import Setting, instruction_set
from tdc_fast.text_files import read_json

_VERSION = 1
_HEAD = ("version", *(entry.name for entry in dataclasses.fields(Setting)), "facts", "rows")
_LATER = ("backends", "instruction_set")  # not in the files of earlier versions
_PAIRS = ("filter", "stride", "padding")
_ROW = (*(entry.name for entry in dataclasses.fields(Layer)), "ns")


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of layers in one setting; a `LatencyModel`.

    Attributes:
        setting: where and how they were measured.
        rows: {layer: nanoseconds of one forward}.
        facts: JSON values about the measurement, such as its date and the versions of packages.
        source: what errors call the table, such as its file.
        backends: by kind of layer the backends that ran it, as `backends_of` gives them; {} where that is not known.
        instruction_set: of the CPU kernels, as `instruction_set` gives it; "" on a GPU and where that is not known.
    """

    setting: Setting
    rows: Mapping[Layer, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = "the latency table"
    backends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    instruction_set: str = ""

    def nanoseconds(self, layer: Layer) -> int:
        """The time of a layer: its own row's, or that of the next wider one.

        Raises:
            ValueError: no row is of this layer with at least as many live channels.
        """
        exact = self.rows.get(layer)
        if exact is not None:
            return exact
        wider = [
            (row.live_in + row.live_out, -ns)
            for row, ns in self._by_shape.get(layer.full, ())
            if row.live_in >= layer.live_in and row.live_out >= layer.live_out
        ]
        if not wider:
            remedy = "a layer that was measured; python -m tdc_fast.latency measures those of a model"
            raise invalid(self.source, f"no row for {layer}", remedy)
        return -min(wider)[1]

    def check(self, setting: Setting, device: torch.device | None = None) -> None:
        """Refuse another setting than the table's own, and other backends or another instruction set.

        Args:
            setting: where and how the layers are to run.
            device: the device itself, which the choice of backends needs; None compares only the setting.

        Raises:
            ValueError: naming what differs.
        """
        for entry in dataclasses.fields(Setting):
            mine, wanted = getattr(self.setting, entry.name), getattr(setting, entry.name)
            if mine != wanted:
                remedy = f"{wanted!r}, as in this run; python -m tdc_fast.latency measures a table for it"
                raise invalid(f"{self.source}: {entry.name}", mine, remedy)
        if device is None:
            return
        wanted = instruction_set(device)
        if self.instruction_set not in ("", wanted):
            remedy = f"{wanted or 'none'}, as in this run; python -m tdc_fast.latency measures a table for it"
            raise invalid(f"{self.source}: instruction_set", self.instruction_set, remedy)
        if not self.backends:
            return
        forced = os.environ.get(ENVIRONMENT)
        run = f"this run with {ENVIRONMENT}={forced}" if forced else "this run"
        for kind, names in backends_of(self.rows, setting, device).items():
            measured = self.backends.get(kind, names)
            if measured != names:
                remedy = f"{' and '.join(names)}, as in {run}; python -m tdc_fast.latency measures a table for it"
                raise invalid(f"{self.source}: backend of {kind}", " and ".join(measured), remedy)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, a row on each line."""
        head = {"version": _VERSION, **dataclasses.asdict(self.setting), "facts": dict(self.facts)}
        head |= {"backends": {kind: list(names) for kind, names in self.backends.items()}} if self.backends else {}
        head |= {"instruction_set": self.instruction_set} if self.instruction_set else {}
        rows = [json.dumps({**dataclasses.asdict(layer), "ns": ns}) for layer, ns in self.rows.items()]
        text = json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"
        with atomic_file(Path(path)) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ValueError: naming the file and what is wrong in it.
        """
        try:
            data = read_json(Path(path))
            _check_fields("table", data, _HEAD, _LATER)
            if type(data["version"]) is not int or data["version"] != _VERSION:
                raise invalid("version", data["version"], f"{_VERSION}, the version of tables this release reads")
            setting = Setting(**{entry.name: data[entry.name] for entry in dataclasses.fields(Setting)})
            if not isinstance(data["facts"], dict):
                raise invalid("facts", data["facts"], "an object")
            if not isinstance(data["rows"], list) or not data["rows"]:
                raise invalid("rows", data["rows"], "a list of at least one row")
            rows: dict[Layer, int] = {}
            for number, row in enumerate(data["rows"]):
                layer, ns = _row(f"rows[{number}]", row)
                if layer in rows:
                    raise invalid(f"rows[{number}]", str(layer), "every layer once")
                rows[layer] = ns
            isa = data.get("instruction_set", "")
            if not isinstance(isa, str):
                raise invalid("instruction_set", isa, "the name of an instruction set")
            return cls(setting, rows, data["facts"], str(path), _backends(data.get("backends", {})), isa)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is not a valid latency table: {error}") from error

    @cached_property
    def _by_shape(self) -> dict[Layer, list[tuple[Layer, int]]]:
        found: dict[Layer, list[tuple[Layer, int]]] = {}
        for layer, ns in self.rows.items():
            found.setdefault(layer.full, []).append((layer, ns))
        return found


def _backends(data: Any) -> dict[str, tuple[str, ...]]:
    """The backends by kind of layer, from their lists."""
    found: dict[str, tuple[str, ...]] = {}
    for kind, names in data.items() if isinstance(data, dict) else [("", None)]:
        if kind not in KINDS or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise invalid("backends", data, f"a list of names for any of {KINDS}")
        found[kind] = tuple(names)
    return found


def _check_fields(where: str, data: Any, expected: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(data, dict) or set(data) - set(optional) != set(expected):
        odd = sorted(set(expected).symmetric_difference(set(data) - set(optional))) if isinstance(data, dict) else data
        raise invalid(where, odd, f"an object with exactly the fields {sorted(expected)}")


def _row(where: str, data: Any) -> tuple[Layer, int]:
    """The layer and the time of a row."""
    _check_fields(where, data, _ROW)
    values = dict(data)
    for name, value in values.items():
        if name == "kind":
            if value not in KINDS:
                raise invalid(f"{where}: kind", value, f"one of {KINDS}")
            continue
        least = 0 if name in ("live_in", "live_out", "padding") else 1
        numbers = value if name in _PAIRS and isinstance(value, list) else [value]
        wanted = 2 if name in _PAIRS else 1
        most = MAX_NANOSECONDS if name == "ns" else 2**31 - 1
        if len(numbers) != wanted or not all(type(number) is int and least <= number <= most for number in numbers):
            kind = "a pair of integers" if wanted == 2 else "an integer"
            raise invalid(f"{where}: {name}", value, f"{kind} of at least {least} and at most {most}")
        if wanted == 2:
            values[name] = tuple(numbers)
    ns = values.pop("ns")
    layer = Layer(**values)
    if min(layer.out_size) < 1 or layer.upsample > 2:
        raise invalid(
            where, str(layer), "a filter that fits in its padded image, of its own size or upsampled to twice"
        )
    if layer.kind == "group_norm" and (layer.in_channels % layer.num_groups or layer.in_channels != layer.out_channels):
        raise invalid(where, str(layer), f"as many channels on both sides, in {layer.num_groups} equal groups")
    if layer.live_in > layer.in_channels or layer.live_out > layer.out_channels:
        raise invalid(where, str(layer), "at most as many live channels as there are")
    return layer, ns
