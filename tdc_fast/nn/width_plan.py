"""The width plan: the order and width of every pruning unit of every expert, in a JSON file that is checked on load."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdc_fast.atomic import atomic_file
from tdc_fast.errors import invalid
from tdc_fast.nn.units import Prunable, PruningUnit, module_of
from tdc_fast.text_files import read_json

_VERSION = 1
_FIELDS = {"version", "base_hash", "boundaries", "experts", "macs", "budgets"}


def base_hash(module: nn.Module) -> str:
    """The sha256 (hex) of the state dict's names, dtypes, shapes and bytes; independent of device and memory format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
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


@dataclass(frozen=True, kw_only=True)
class WidthPlan:
    """How wide every unit of every expert is.

    Attributes:
        base_hash: `base_hash` of the model that the orders refer to.
        boundaries: the timestep groups' boundaries, N + 1 integers from 0 to T.
        experts: for each group, all units of the model by name.
        macs: measured forward MACs per sample of each expert; () when not measured.
        budgets: the MACs that each expert was allowed; () without a budget.
        version: version of the file's format.
    """

    base_hash: str
    boundaries: tuple[int, ...]
    experts: tuple[Mapping[str, ExpertUnit], ...]
    macs: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()
    version: int = _VERSION

    def __post_init__(self) -> None:
        for name in ("boundaries", "experts", "macs", "budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.version != _VERSION:
            raise invalid("version", self.version, f"{_VERSION}, the version of width plans this release reads")
        bounds = self.boundaries
        if len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise invalid("boundaries", bounds, "integers increasing from 0 to the number of timesteps")
        if len(self.experts) != len(bounds) - 1:
            raise invalid("experts", len(self.experts), f"one expert for each of the {len(bounds) - 1} groups")
        for name in ("macs", "budgets"):
            values = getattr(self, name)
            if values and len(values) != len(self.experts):
                raise invalid(name, values, f"one number for each of the {len(self.experts)} experts, or none")

    @classmethod
    def uniform(cls, base: Prunable, boundaries: Sequence[int], fraction: float | Sequence[float] = 1.0) -> WidthPlan:
        """Every unit at a fraction of its width, rounded down to a step; the first channels are kept.

        Args:
            base: the denoiser.
            boundaries: the timestep groups' boundaries, N + 1 integers.
            fraction: a number from 0 to 1, or one per group.

        Raises:
            ValueError: for a base that cannot be pruned, a fraction outside 0 to 1, or another number of them.
        """
        module, units = module_of(base), base.pruning_units()
        count = len(boundaries) - 1
        fractions = [fraction] * count if isinstance(fraction, int | float) else list(fraction)
        if len(fractions) != count or not all(0 <= part <= 1 for part in fractions):
            raise invalid("fraction", fraction, f"a number from 0 to 1, or {count} of them")
        experts = [
            {
                unit.name: ExpertUnit(tuple(range(unit.num_atoms)), int(unit.channels * part / unit.step) * unit.step)
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
        }

    @classmethod
    def from_json(cls, data: Any) -> WidthPlan:
        """The plan that `to_json` gave; ValueError names a field that is missing, unknown or of a wrong type."""
        _check_keys("width plan", data, _FIELDS)
        if type(data["version"]) is not int or data["version"] != _VERSION:
            raise invalid("version", data["version"], f"{_VERSION}, the version of width plans this release reads")
        digest = data["base_hash"]
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise invalid("base_hash", digest, "64 hexadecimal digits")
        if not isinstance(data["experts"], list):
            raise invalid("experts", data["experts"], "a list with one object per group")
        experts = []
        for index, expert in enumerate(data["experts"]):
            if not isinstance(expert, dict):
                raise invalid(f"experts[{index}]", expert, "an object of units by name")
            units = {}
            for name, unit in expert.items():
                where = f"experts[{index}][{name!r}]"
                _check_keys(where, unit, {"order", "width"})
                if type(unit["width"]) is not int:
                    raise invalid(f"{where}.width", unit["width"], "an integer")
                units[name] = ExpertUnit(_numbers(f"{where}.order", unit["order"], int), unit["width"])
            experts.append(units)
        return cls(
            base_hash=digest,
            boundaries=_numbers("boundaries", data["boundaries"], int),
            experts=tuple(experts),
            macs=_numbers("macs", data["macs"], int, float),
            budgets=_numbers("budgets", data["budgets"], int, float),
        )

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


def _check_keys(where: str, data: Any, expected: set[str]) -> None:
    if not isinstance(data, dict):
        raise invalid(where, data, f"an object with the fields {sorted(expected)}")
    for name in sorted(expected - data.keys()):
        raise invalid(f"{where}: {name}", "nothing", "this field")
    for name in sorted(data.keys() - expected):
        raise invalid(f"{where}: {name}", data[name], f"only the fields {sorted(expected)}")


def _numbers(where: str, data: Any, *types: type) -> tuple[Any, ...]:
    if not isinstance(data, list) or any(type(value) not in types for value in data):
        raise invalid(where, data, f"a list of {' or '.join(kind.__name__ for kind in types)} numbers")
    return tuple(data)
