"""Which layers of the experts hold one set of weights for several neighbouring groups, and for which groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from tdc_fast.errors import invalid
from tdc_fast.nn.units import HasLayerSets, PruningUnit
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan

Rows = tuple[int, ...]
"""For each of the N groups its row of a layer's stacked weights; rows are numbered in the order of the groups."""

MAX_TERMS = 1000


def shared_rows(
    model: nn.Module, shared_layers: str | Sequence[str], num_groups: int, layers: Iterable[str] | None = None
) -> dict[str, Rows]:
    """The layers that groups share, with the row of weights of every group.

    Args:
        model: the base. What it names in `layer_sets()`, if it has them, may be used below.
        shared_layers: comma list (or a sequence) of terms `NAME` or `NAME:SIZE`. NAME is one of the model's sets, or a
            pattern of paths such as `input_blocks.*` (`*` is any text); SIZE is how many neighbouring groups share a
            row, all of them where it is left out. The last term that names a layer decides, so `:1` makes exceptions.
        num_groups: N.
        layers: paths of what can be shared; None takes all modules with parameters of their own.

    Returns:
        The rows by path; layers of which every group has its own weights are left out.

    Raises:
        ValueError: a term names no layer, or its SIZE is not a number of groups.
    """
    terms = _terms(shared_layers)
    if not terms:
        return {}
    if layers is None:
        layers = (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    layers = list(layers)
    layer_sets = model.layer_sets() if isinstance(model, HasLayerSets) else {}
    found: dict[str, Rows] = {}
    for term in terms:
        name, colon, size_text = term.partition(":")
        if colon and not (size_text.isdecimal() and size_text.isascii() and 1 <= int(size_text[:9]) <= 2**16):
            raise invalid("shared_layers", term, "a number of neighbouring groups, 1 or more, after the colon")
        size = int(size_text) if colon else num_groups
        named = layer_sets.get(name) or [layer for layer in layers if fnmatchcase(layer, name)]
        if not named:
            remedy = f"a name out of {', '.join(layer_sets) or 'none'}, or a pattern of paths such as {layers[0]}"
            raise invalid("shared_layers", term, remedy)
        found.update(dict.fromkeys(named, tuple(group // size for group in range(num_groups))))
    return {name: rows for name, rows in found.items() if rows[-1] + 1 < num_groups}


def _terms(shared_layers: str | Sequence[str]) -> list[str]:
    parts: Any = shared_layers.split(",") if isinstance(shared_layers, str) else shared_layers
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise invalid("shared_layers", shared_layers, "a comma list of names or patterns of layers, or a sequence")
    terms = [part.strip() for part in parts if part.strip()]
    if len(terms) > MAX_TERMS:
        raise invalid("shared_layers", f"{len(terms)} terms", f"at most {MAX_TERMS}; a pattern names many layers")
    return terms


def sharers(rows: Rows) -> list[list[int]]:
    """The groups that use each row, by row."""
    return [[group for group, own in enumerate(rows) if own == row] for row in range(max(rows) + 1)]


def groups_together(shared: Mapping[str, Rows], num_groups: int) -> Rows:
    """For each group the number of its set, where groups that share any layer are of one set.

    Args:
        shared: the shared layers' rows.
        num_groups: N.
    """
    return _common_runs([*shared.values(), tuple(range(num_groups))])


def unit_rows(units: Sequence[PruningUnit], shared: Mapping[str, Rows]) -> dict[str, Rows]:
    """Of every unit whose channels are an axis of a shared layer, which groups must order its atoms alike.

    Args:
        units: the model's units.
        shared: the shared layers' rows.

    Returns:
        By unit, for each group the number of its set: the largest sets of all the unit's layers.
    """
    found = {}
    for unit in units:
        of_unit = [shared[part.module] for part in unit.slices if part.module in shared]
        if of_unit:
            found[unit.name] = _common_runs(of_unit)
    return found


def _common_runs(partitions: Sequence[Rows]) -> Rows:
    """The finest division into runs of neighbours that splits no set of any of the divisions."""
    runs, number = [0], 0
    for group in range(1, len(partitions[0])):
        number += all(rows[group] != rows[group - 1] for rows in partitions)
        runs.append(number)
    return tuple(runs)


def in_common_orders(widths: WidthPlan, units: Sequence[PruningUnit], shared: Mapping[str, Rows]) -> WidthPlan:
    """The plan with one order of atoms for all groups that share a layer of the unit; every group keeps the same atoms.

    A narrower group then reads the first channels of what a wider one reads.

    Raises:
        ValueError: a group keeps an atom that a wider group, which shares a layer with it, does not keep.
    """
    experts = [dict(expert) for expert in widths.experts]
    atoms = {unit.name: unit.atom for unit in units}
    for name, rows in unit_rows(units, shared).items():
        for groups in sharers(rows):
            narrowest_first = sorted(groups, key=lambda group: experts[group][name].width)
            order: list[int] = []
            for group in narrowest_first:
                entry = experts[group][name]
                kept = entry.order[: entry.width // atoms[name]]
                if not set(order) <= set(kept):
                    lost = sorted(set(order) - set(kept))
                    remedy = f"an order that keeps {lost} as well, as a narrower group that shares a layer with it does"
                    raise invalid(f"experts[{group}][{name!r}].order", entry.order, remedy)
                order += [atom for atom in kept if atom not in order]
            order += [atom for atom in experts[groups[0]][name].order if atom not in order]
            for group in groups:
                experts[group][name] = ExpertUnit(tuple(order), experts[group][name].width)
    return replace(widths, experts=tuple(experts))
