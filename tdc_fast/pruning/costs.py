"""What each unit of a model costs at each of its widths: multiply-accumulates (MACs), measured, or estimated time.

The MACs of a prunable model must be a constant plus one function of each unit's width; `unit_costs` measures
these functions and checks that they add up. Time comes from a latency model (`tdc_fast.pruning.latency`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.nn.units import Prunable, PruningUnit, module_of, units_of, with_widths


@dataclass(frozen=True)
class UnitCosts:
    """What a model costs: a constant plus one function of each unit's width.

    Attributes:
        fixed: cost of everything that is not a unit.
        tables: {unit: {width in channels: cost}}.
        measure: "MACs" of one sample, or "ns": nanoseconds of one forward of a batch whose samples all have these
            widths.
    """

    fixed: int
    tables: dict[str, dict[int, int]]
    measure: str = "MACs"

    def total(self, widths: Mapping[str, int]) -> int:
        """Cost of the model with these widths; every unit must be named."""
        return self.fixed + sum(table[widths[name]] for name, table in self.tables.items())

    def full(self) -> int:
        """Cost of the whole model."""
        return self.fixed + sum(table[max(table)] for table in self.tables.values())

    def least(self) -> int:
        """Cost of the cheapest choice of widths."""
        return self.fixed + sum(min(table.values()) for table in self.tables.values())

    def at_widths_of(self, units: Sequence[PruningUnit]) -> UnitCosts:
        """The costs at the widths that these units allow, which may be fewer than those with known costs."""
        tables = {unit.name: {width: self.tables[unit.name][width] for width in unit.widths()} for unit in units}
        return UnitCosts(self.fixed, tables, self.measure)

    def paying(self, unit: PruningUnit) -> tuple[int, ...]:
        """The allowed widths of a unit that are worth choosing, ascending.

        In MACs these are all. In time a width may cost as much as a wider one, or more: such a width does not pay.
        """
        widths, table = unit.widths(), self.tables[unit.name]
        if self.measure == "MACs":
            return widths
        return tuple(width for i, width in enumerate(widths) if all(table[width] < table[w] for w in widths[i + 1 :]))


def one_sample_on_meta(x: Tensor, model_kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One sample without data, (x, t, model_kwargs), shaped like those of a batch.

    It is on the device "meta", which computes only shapes; counting needs no more.

    Args:
        x: images (B, ...).
        model_kwargs: the model's keyword arguments, tensors (B, ...) or other values.
    """
    kwargs = {
        name: value[:1].to("meta") if isinstance(value, Tensor) else value for name, value in model_kwargs.items()
    }
    return x[:1].to("meta"), torch.zeros(1, dtype=torch.int64, device="meta"), kwargs


def unit_costs(model: nn.Module | Prunable, x: Tensor, model_kwargs: Mapping[str, Any] | None = None) -> UnitCosts:
    """Measure the MACs per sample of every unit at each of its widths.

    If every unit is named after the module that contains it, all units are measured in the same forward passes, each by
    its module's count; otherwise one unit is changed at a time.

    Args:
        model: is not changed.
        x: images (B, ...), of which only shape and dtype matter.
        model_kwargs: keyword arguments of the model, such as {"y": labels}.

    Raises:
        ValueError: the model cannot be pruned, or the measured costs do not add up.
    """
    module_of(model, "model")
    units = units_of(model)
    sample = one_sample_on_meta(x, model_kwargs or {})
    template: Any = with_widths(model, {}).to("meta")
    costs = _costs_by_module(template, units, sample) or _costs_one_by_one(template, units, sample)
    for whole in range(2):  # every other unit whole, the others at their smallest width
        mixed = {unit.name: unit.widths()[-((i + whole) % 2)] for i, unit in enumerate(units)}
        measured = _measure(template, mixed, sample)
        if measured != costs.total(mixed):
            raise invalid(
                "model",
                f"{measured} MACs where its units' costs add up to {costs.total(mixed)}",
                "a model whose MACs are a constant plus one function of each unit's width",
            )
    return costs


Sample = tuple[Tensor, Tensor, dict[str, Any]]


def _measure(template: Any, widths: Mapping[str, int], sample: Sample) -> int:
    x, t, kwargs = sample
    return measure_macs(with_widths(template, widths), x, t, **kwargs)


def _costs_one_by_one(template: Any, units: Sequence[PruningUnit], sample: Sample) -> UnitCosts:
    """Each unit alone at each width, all others at full width; costs count from width 0."""
    whole = _measure(template, {}, sample)
    tables: dict[str, dict[int, int]] = {}
    saved = 0
    for unit in units:
        totals = {width: _measure(template, {unit.name: width}, sample) for width in unit.widths()}
        tables[unit.name] = {width: total - totals[0] for width, total in totals.items()}
        saved += whole - totals[0]
    return UnitCosts(whole - saved, tables)


def _costs_by_module(template: Any, units: Sequence[PruningUnit], sample: Sample) -> UnitCosts | None:
    """All units at their j-th width at once; each unit's MACs are those counted inside the module of its name.

    None if the names are not those of separate modules, or the MACs of the rest of the model vary.
    """
    names = [unit.name for unit in units]
    modules = {name for name, _ in template.named_modules()}
    if not set(names) <= modules or any(a != b and b.startswith(a + ".") for a in names for b in names):
        return None
    x, t, kwargs = sample
    counts: dict[str, dict[int, int]] = {name: {} for name in names}
    rest = set()
    for j in range(max((len(unit.widths()) for unit in units), default=1)):
        widths = {unit.name: unit.widths()[min(j, len(unit.widths()) - 1)] for unit in units}
        model = with_widths(template, widths)
        with torch.no_grad(), MacCounter() as counter, _macs_inside(model, names, counter) as inside:
            model(x, t, **kwargs)
        for name in names:
            counts[name][widths[name]] = inside[name]
        rest.add(counter.macs - sum(inside.values()))
    if len(rest) != 1:
        return None
    base = {name: counts[name][0] for name in names}  # e.g. a block's skip path, which pruning leaves
    tables = {name: {w: macs - base[name] for w, macs in counts[name].items()} for name in names}
    return UnitCosts(rest.pop() + sum(base.values()), tables)


@contextmanager
def _macs_inside(model: nn.Module, names: Sequence[str], counter: MacCounter) -> Iterator[dict[str, int]]:
    """{name of a module: MACs that are counted within it}, filled as the model runs; 0 for one that never runs."""
    inside = dict.fromkeys(names, 0)

    def add(name: str, macs: int) -> None:
        inside[name] += macs

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: add(name, -counter.macs)))
        handles.append(module.register_forward_hook(lambda *_, name=name: add(name, counter.macs)))
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()
