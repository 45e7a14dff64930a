"""Projection: the allowed widths nearest to a proposal that meet a budget, found exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdc_fast.errors import integer, invalid
from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.solver import Solution, UnitTable, solve


def project(
    units: Sequence[PruningUnit],
    costs: UnitCosts,
    budget: int,
    tolerance: float,
    proposal: Mapping[str, int],
    weights: Mapping[str, float] | None = None,
) -> Solution:
    """The allowed widths nearest to a proposal whose cost lies within `tolerance` below the budget.

    The distance is the sum over units of weight * |width - proposed| / channels. A proposal that is allowed and within
    the budget's window is returned unchanged, unless a wider unit would take no more time (`UnitCosts.paying`).

    Args:
        units: the pruning units.
        costs: what they cost at every width.
        budget: the cost allowed.
        tolerance: share of the budget that may stay unused.
        proposal: {unit: channels}.
        weights: {unit: weight in the distance}; 1 where it is not given.

    Raises:
        ValueError: a unit is missing, unknown, or proposed outside [0, channels].
    """
    check_proposal(units, proposal)
    tables = []
    for unit in units:
        wanted, weight = proposal[unit.name], 1.0 if weights is None else weights.get(unit.name, 1.0)
        widths = costs.paying(unit)
        prices = tuple(costs.tables[unit.name][width] for width in widths)
        nearness = tuple(-weight * abs(width - wanted) / unit.channels for width in widths)
        tables.append(UnitTable(unit.name, widths, prices, nearness))
    return solve(tables, budget, fixed=costs.fixed, tolerance=tolerance, measure=costs.measure)


def check_proposal(units: Sequence[PruningUnit], proposal: Mapping[str, int]) -> None:
    """Check that there is one integer from 0 to the unit's channels for each of the units.

    Raises:
        ValueError: naming the unit.
    """
    names = {unit.name for unit in units}
    if set(proposal) != names:
        odd = sorted(names.symmetric_difference(proposal))
        raise invalid("proposal", odd, "one width for each unit of the task, and no others")
    for unit in units:
        integer(f"proposal[{unit.name!r}]", proposal[unit.name], 0, unit.channels)
