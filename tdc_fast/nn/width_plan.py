"""The width plan: the order and width of every pruning unit of every expert, in a JSON file that is checked on load."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdc_fast.atomic import atomic_file
from tdc_fast.errors import invalid, is_integer
from tdc_fast.nn.units import Prunable, PruningUnit, module_of, units_of
from tdc_fast.routing import TimestepGroups
from tdc_fast.text_files import read_json

_VERSION = 1
_FIELDS = {"version", "base_hash", "boundaries", "experts", "macs", "budgets"}
_OPTIONAL = ("latency", "latency_budgets")  # not in the file where there is none


def base_hash(module: nn.Module) -> str:
    """The sha256 (hex) of the state dict's names, dtypes, shapes and bytes; independent of device and memory format.

    Raises:
        ValueError: a tensor of the state dict is on the meta device, so it has no bytes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            raise invalid("base", f"{name} on the meta device", "a model whose weights have values: load them first")
        value = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ExpertUnit:
    """One unit of one expert.

    Attributes:
        order: a permutation of the unit's atoms, most important first.
        width: number of live channels.
    """

    order: tuple[int, ...]
    width: int


@dataclass(frozen=True, kw_only=True, repr=False)
class WidthPlan:
    """How wide every unit of every expert is; `print` shows a table of it.

    Sequences and mappings are copied, and numpy's numbers become Python's. Every way to make a plan, `load` included,
    makes the same checks and raises a ValueError that names the field.

    Attributes:
        base_hash: `base_hash` of the model that the orders refer to.
        boundaries: the timestep groups' boundaries, N + 1 integers from 0 to T.
        experts: for each group, all units of the model by name.
        macs: measured forward MACs per sample of each expert; () when not measured.
        budgets: the MACs that each expert was allowed; () without a budget in MACs.
        latency: estimated time of each expert, the nanoseconds of one forward of a whole batch of its samples; () when
            not estimated.
        latency_budgets: the time that each expert was allowed, likewise; () without a budget in time.
        version: version of the file's format.
    """

    base_hash: str
    boundaries: tuple[int, ...]
    experts: tuple[Mapping[str, ExpertUnit], ...]
    macs: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()
    latency: tuple[float, ...] = ()
    latency_budgets: tuple[float, ...] = ()
    version: int = _VERSION

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != _VERSION:
            raise invalid("version", self.version, f"{_VERSION}, the version of width plans this release reads")
        digest = self.base_hash
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise invalid("base_hash", digest, "64 hexadecimal digits")
        checked: dict[str, Any] = {"boundaries": TimestepGroups(self.boundaries).boundaries}
        count = len(checked["boundaries"]) - 1
        if not isinstance(self.experts, (list, tuple)) or len(self.experts) != count:
            raise invalid("experts", self.experts, f"a list with one expert for each of the {count} groups")
        checked["experts"] = tuple(_units(f"experts[{index}]", expert) for index, expert in enumerate(self.experts))
        for name in ("macs", "budgets", *_OPTIONAL):
            checked[name] = _numbers(name, getattr(self, name))
            if checked[name] and len(checked[name]) != count:
                raise invalid(name, checked[name], f"one number for each of the {count} experts, or none")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """A table: every group's timesteps, its expert's live channels, MACs and budget, and time where estimated."""
        columns = {"MACs": self.macs, "budget": self.budgets}
        if self.latency:
            columns = {"MACs": self.macs, "ns": self.latency, "budget": self.budgets or self.latency_budgets}
        rows = [("group", "timesteps", "channels", *columns)]
        for index, (start, stop) in enumerate(itertools.pairwise(self.boundaries)):
            live = sum(self.expert_widths(index).values())
            costs = (f"{values[index]:.4g}" if values else "-" for values in columns.values())
            rows.append((str(index), f"{start} to {stop - 1}", str(live), *costs))
        lengths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.rjust, row, lengths)) for row in rows]
        return "\n".join([f"WidthPlan of base {self.base_hash[:12]}, {len(self.experts[0])} units", *lines])

    def __repr__(self) -> str:
        return f"<WidthPlan of base {self.base_hash[:12]}: {len(self.experts)} experts, boundaries {self.boundaries}>"

    @classmethod
    def uniform(
        cls, base: nn.Module | Prunable, boundaries: Sequence[int], fraction: float | Sequence[float] = 1.0
    ) -> WidthPlan:
        """Every unit at a fraction of its width, rounded down to a step; the first channels are kept.

        A fraction of less than a step removes a unit: its block computes the residual path alone.

        Args:
            base: the denoiser.
            boundaries: the timestep groups' boundaries, N + 1 integers.
            fraction: a number from 0 to 1, or one per group.

        Raises:
            ValueError: for a base that cannot be pruned, a fraction outside 0 to 1, or another number of them.
        """
        module, units = module_of(base), units_of(base)
        count = TimestepGroups(boundaries).num_groups
        fractions: list[Any] = list(fraction) if isinstance(fraction, Iterable) else [fraction] * count
        if len(fractions) != count or not all(_is_number(part) and 0 <= part <= 1 for part in fractions):
            raise invalid("fraction", fraction, f"a number from 0 to 1, or {count} of them")
        experts = [
            {
                unit.name: ExpertUnit(tuple(range(unit.num_atoms)), _part_of(unit.channels, part, unit.step))
                for unit in units
            }
            for part in fractions
        ]
        return cls(base_hash=base_hash(module), boundaries=tuple(boundaries), experts=tuple(experts))

    def max_width(self, unit: str) -> int:
        """The width of a unit in the expert where it is widest, in channels."""
        return max(expert[unit].width for expert in self.experts)

    def expert_widths(self, index: int) -> dict[str, int]:
        """Live channels of one expert by unit name."""
        return {name: unit.width for name, unit in self.experts[index].items()}

    def check(
        self,
        units: Sequence[PruningUnit],
        *,
        base: str | None = None,
        boundaries: Sequence[int] | None = None,
    ) -> None:
        """Check that this plan fits a model.

        Args:
            units: the model's units.
            base: the model's `base_hash`; None does not compare it.
            boundaries: the boundaries of its groups; None does not compare them.

        Raises:
            ValueError: naming the first field that does not fit.
        """
        if base is not None and base != self.base_hash:
            raise invalid(
                "base_hash",
                self.base_hash,
                f"{base}, the hash of this model: the plan is of another one",
            )
        if boundaries is not None and tuple(boundaries) != self.boundaries:
            raise invalid("boundaries", self.boundaries, f"{tuple(boundaries)}, the boundaries of these groups")
        known = {unit.name: unit for unit in units}
        for index, expert in enumerate(self.experts):
            for name in expert.keys() ^ known.keys():
                raise invalid(f"experts[{index}][{name!r}]", name, f"exactly the model's units {sorted(known)}")
            for name, entry in expert.items():
                unit, where = known[name], f"experts[{index}][{name!r}]"
                if sorted(entry.order) != list(range(unit.num_atoms)):
                    raise invalid(f"{where}.order", entry.order, f"a permutation of 0 to {unit.num_atoms - 1}")
                if entry.width not in unit.widths():
                    raise invalid(f"{where}.width", entry.width, f"one of {unit.widths()}")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, which `from_json` reads."""
        return {
            "version": self.version,
            "base_hash": self.base_hash,
            "boundaries": list(self.boundaries),
            "experts": [
                {name: {"order": list(unit.order), "width": unit.width} for name, unit in expert.items()}
                for expert in self.experts
            ],
            "macs": list(self.macs),
            "budgets": list(self.budgets),
            **{name: list(getattr(self, name)) for name in _OPTIONAL if getattr(self, name)},
        }

    @classmethod
    def from_json(cls, data: Any) -> WidthPlan:
        """The plan that `to_json` gave; ValueError names a field that is missing, unknown or of a wrong type."""
        _check_keys("width plan", data, _FIELDS, _OPTIONAL)
        if not isinstance(data["experts"], list):
            raise invalid("experts", data["experts"], "a list with one object per group")
        experts = []
        for index, expert in enumerate(data["experts"]):
            if not isinstance(expert, dict):
                raise invalid(f"experts[{index}]", expert, "an object of units by name")
            for name, unit in expert.items():
                _check_keys(f"experts[{index}][{name!r}]", unit, {"order", "width"})
            experts.append({name: ExpertUnit(**unit) for name, unit in expert.items()})
        return cls(**{**data, "experts": experts})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON atomically: a reader sees the old file or the whole new one."""
        with atomic_file(Path(path)) as file:
            file.write(json.dumps(self.to_json()).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WidthPlan:
        """Read what `save` wrote; ValueError names the file and what is wrong in it."""
        try:
            return cls.from_json(read_json(Path(path)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is not a valid width plan: {error}") from error


def _check_keys(where: str, data: Any, expected: set[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(data, dict):
        raise invalid(where, data, f"an object with the fields {sorted(expected)}")
    for name in sorted(expected - data.keys()):
        raise invalid(f"{where}: {name}", "nothing", "this field")
    for name in sorted(data.keys() - expected - set(optional)):
        raise invalid(f"{where}: {name}", data[name], f"only the fields {sorted(expected.union(optional))}")


def _part_of(channels: int, part: float, step: int) -> int:
    """A fraction of a width, rounded down to a step; of the decimal number that is meant, as 100 * 0.29 is 28.999."""
    return int(Fraction(str(part)) * channels / step) * step


def _is_number(value: Any) -> bool:
    return is_integer(value) or isinstance(value, (float, np.floating))


def _numbers(where: str, values: Any) -> tuple[float, ...]:
    """The finite numbers of a sequence as ints and floats."""
    if not isinstance(values, (list, tuple)) and not (isinstance(values, np.ndarray) and values.ndim == 1):
        raise invalid(where, values, "a list of numbers")
    for value in values:
        if not _is_number(value) or not 0 <= value <= sys.float_info.max:
            raise invalid(where, value, "finite numbers of at least 0")
    return tuple(int(value) if is_integer(value) else float(value) for value in values)


def _units(where: str, expert: Any) -> dict[str, ExpertUnit]:
    """The units of an expert, checked and copied."""
    if not isinstance(expert, Mapping):
        raise invalid(where, expert, "a mapping of units by name")
    units = {}
    for name, unit in expert.items():
        if not isinstance(name, str):
            raise invalid(where, name, "names of units as keys")
        if not isinstance(unit, ExpertUnit):
            raise invalid(f"{where}[{name!r}]", unit, "an ExpertUnit")
        if not is_integer(unit.width) or unit.width < 0:
            raise invalid(f"{where}[{name!r}].width", unit.width, "a number of channels, an integer")
        order = unit.order
        if not isinstance(order, (list, tuple, range, np.ndarray)) or not all(map(is_integer, order)):
            raise invalid(f"{where}[{name!r}].order", order, "a sequence of integers")
        units[name] = ExpertUnit(tuple(map(int, order)), int(unit.width))
    return units
