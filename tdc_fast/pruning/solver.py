"""The best widths within a budget: an exact integer solve over the units' widths.

Each unit has a short list of widths; each width has an integer cost (MACs, or nanoseconds) and a value (kept
importance, or minus the distance from a proposal). One width per unit is chosen so that the sum of the values is
largest while the sum of the costs lies in `[floor, budget]`: the multiple-choice knapsack problem with a lower bound on
the load.

The method is dynamic programming over the exact sums of costs (one state per distinct sum, never rounded), kept small
by upper bounds. The value that the undecided units can still add is bounded by the concave hulls of their tables (the
linear relaxation, solved once per suffix of units), and a state whose bound does not beat a known solution is dropped
(D. Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995). Passes with a limited number of
states provide that solution; the first pass that never reaches its limit is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tdc_fast.errors import invalid

_FIRST_LIMIT = 512
_LIMIT_GROWTH = 16


@dataclass(frozen=True)
class UnitTable:
    """The choices of one unit.

    Attributes:
        name: of the unit.
        widths: in channels.
        costs: cost of each width, integers >= 0.
        values: value of each width, finite.

    Raises:
        ValueError: the lists differ in length, or hold other numbers.
    """

    name: str
    widths: tuple[int, ...]
    costs: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.widths or not len(self.widths) == len(self.costs) == len(self.values):
            lengths = (len(self.widths), len(self.costs), len(self.values))
            raise invalid(f"tables[{self.name!r}]", lengths, "one cost and one value for each width")
        if any(cost < 0 for cost in self.costs) or not np.isfinite(self.values).all():
            raise invalid(f"tables[{self.name!r}]", (self.costs, self.values), "costs >= 0 and finite values")


@dataclass(frozen=True)
class Solution:
    """The chosen width of every unit.

    Attributes:
        widths: {unit: channels}.
        cost: their cost, with the fixed part.
        value: the sum of their values.
        budget: the cost allowed.
        floor: the cost required.
        measure: what costs count, "MACs" or "ns".
    """

    widths: dict[str, int]
    cost: int
    value: float
    budget: int
    floor: int
    measure: str = "MACs"

    @property
    def reached(self) -> bool:
        """Whether `floor <= cost <= budget`; False only if no choice of widths lands there."""
        return self.floor <= self.cost <= self.budget

    def statement(self) -> str:
        """One sentence that says where the solution lies relative to its budget."""
        share = self.cost / self.budget if self.budget else 1.0
        if self.reached:
            return f"{self.cost} {self.measure}, {share:.4%} of the budget of {self.budget}"
        return (
            f"no choice of widths lands between {self.floor} and {self.budget} {self.measure}; the best below the "
            f"budget has {self.cost} ({share:.4%}): finer units (a smaller step) or another k come closer"
        )


def solve(
    tables: Sequence[UnitTable], budget: int, *, fixed: int = 0, tolerance: float = 0.01, measure: str = "MACs"
) -> Solution:
    """Choose one width per unit: greatest total value with `(1 - tolerance) * budget <= cost <= budget`.

    If no choice lands in that window, the choice of greatest value at or below the budget is returned, with
    `Solution.reached` False. The result depends on the arguments alone; of equally good choices the same one is
    returned every time.

    Args:
        tables: the choices of every unit.
        budget: the cost allowed.
        fixed: cost of everything outside the units.
        tolerance: share of the budget that may stay unused.
        measure: what costs count, for statements.

    Raises:
        ValueError: even the cheapest choice exceeds the budget; names the smallest budget that works.
    """
    budget = int(budget)
    floor = lowest_cost(budget, tolerance)
    least = fixed + sum(min(table.costs) for table in tables)
    if least > budget:
        raise invalid("budget", budget, f"at least {least}, the smallest reachable budget (every unit at its cheapest)")
    room = budget - least  # to spend above the cheapest choice
    search = _Search(tables)
    picks = search.best(max(floor - least, 0), room)
    if picks is None:
        picks = search.best(0, room)
    assert picks is not None  # the cheapest choice is always below the budget
    chosen = list(zip(tables, picks, strict=True))
    return Solution(
        widths={table.name: table.widths[pick] for table, pick in chosen},
        cost=fixed + sum(table.costs[pick] for table, pick in chosen),
        value=float(sum(table.values[pick] for table, pick in chosen)),
        budget=budget,
        floor=floor,
        measure=measure,
    )


def lowest_cost(budget: int, tolerance: float) -> int:
    """The least cost that meets the budget: the smallest integer that is not below (1 - tolerance) * budget."""
    if not 0 <= tolerance < 1:
        raise invalid("tolerance", tolerance, "a share of the budget in [0, 1), such as 0.01")
    return budget - int(tolerance * budget)


@dataclass(frozen=True)
class _Bound:
    """Upper bound on the value that a set of units adds, as a concave function of the cost given to them."""

    cost: np.ndarray  # (points,) float64, ascending, from 0
    value: np.ndarray  # (points,) float64, concave in cost

    @classmethod
    def of(cls, units: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Bound:
        """Merge the units' concave hulls, steepest segments first: the linear relaxation for every load."""
        start, runs, rises = 0.0, [np.zeros(0)], [np.zeros(0)]
        for costs, values in units:
            hull = _concave_hull(costs, values)
            start += values[hull[0]]
            runs.append(np.diff(costs[hull]).astype(np.float64))
            rises.append(np.diff(values[hull]))
        run, rise = np.concatenate(runs), np.concatenate(rises)
        steepest = np.argsort(-rise / run, kind="stable")
        return cls(np.r_[0.0, np.cumsum(run[steepest])], start + np.r_[0.0, np.cumsum(rise[steepest])])

    def at(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The greatest bound over loads in [low, high]; -inf where that interval holds no reachable load."""
        peak = self.cost[int(np.argmax(self.value))]
        low, high = np.maximum(low, 0.0), np.minimum(high, self.cost[-1])
        bound = np.interp(np.clip(peak, low, np.maximum(low, high)), self.cost, self.value)
        return np.where(low <= high, bound, -np.inf)


def _concave_hull(costs: np.ndarray, values: np.ndarray) -> list[int]:
    """Indices of the upper concave hull of the points, by ascending cost; one point per cost."""
    hull: list[int] = []
    for i in np.lexsort((-values, costs)):
        if hull and costs[i] == costs[hull[-1]]:
            continue  # a point of lower value at the same cost
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            slope_to_b = (values[b] - values[a]) / float(costs[b] - costs[a])
            slope_past_b = (values[i] - values[b]) / float(costs[i] - costs[b])
            if slope_to_b > slope_past_b:
                break
            hull.pop()
        hull.append(int(i))
    return hull


class _Search:
    """Bounded dynamic programming over one set of tables; costs count from each unit's cheapest width."""

    def __init__(self, tables: Sequence[UnitTable]) -> None:
        units = []
        for table in tables:
            costs = np.asarray(table.costs, dtype=np.int64)
            units.append((costs - costs.min(), np.asarray(table.values, dtype=np.float64)))
        # Expensive units first: the cheap ones at the end then fill the remaining room closely, which keeps the bounds
        # tight while there are many states.
        self.order = sorted(range(len(units)), key=lambda u: -int(units[u][0].max()))
        self.units = [units[u] for u in self.order]
        self.bounds = [_Bound.of(self.units[u:]) for u in range(len(self.units) + 1)]
        self.rounding = 1e-12 * (1.0 + sum(float(np.abs(values).max()) for _, values in units))

    def best(self, low: int, high: int) -> list[int] | None:
        """The picks (an index per table) of greatest value with low <= cost <= high; None without any."""
        picks: list[int] | None = None
        incumbent, limit = -np.inf, _FIRST_LIMIT
        while True:
            found, exact = self._pass(low, high, incumbent, limit)
            if found is not None:
                incumbent, picks = found
            if exact:
                break
            limit *= _LIMIT_GROWTH
        if picks is None:
            return None
        in_order = [0] * len(picks)
        for position, pick in zip(self.order, picks, strict=True):
            in_order[position] = pick
        return in_order

    def _pass(self, low: int, high: int, incumbent: float, limit: int) -> tuple[tuple[float, list[int]] | None, bool]:
        """One pass over the units that keeps at most `limit` states.

        Returns:
            (value, picks) of a solution better than the incumbent, or None; and whether the pass was exact: no state
            was dropped for lack of room, so nothing better exists.
        """
        cost, value = np.zeros(1, dtype=np.int64), np.zeros(1)
        trail: list[tuple[np.ndarray, np.ndarray]] = []  # per unit: parent state, pick
        exact = True
        for unit, (costs, values) in enumerate(self.units):
            parts = []
            for pick in range(len(costs)):
                new_cost, new_value = cost + costs[pick], value + values[pick]
                bound = new_value + self.bounds[unit + 1].at(low - new_cost, high - new_cost)
                keep = np.flatnonzero(bound > incumbent + self.rounding)
                parts.append((new_cost[keep], new_value[keep], keep, np.full(len(keep), pick), bound[keep]))
            cost, value, parent, picked, bound = (np.concatenate(part) for part in zip(*parts, strict=True))
            if not len(cost):
                return None, exact
            best_first = np.lexsort((-value, cost))
            distinct = best_first[np.r_[True, np.diff(cost[best_first]) > 0]]
            if len(distinct) > limit:
                exact = False
                distinct = distinct[np.sort(np.argsort(-bound[distinct], kind="stable")[:limit])]
            cost, value = cost[distinct], value[distinct]
            trail.append((parent[distinct].astype(np.int32), picked[distinct].astype(np.int16)))
        state = int(np.argmax(value))
        total, picks = float(value[state]), []
        for parent, picked in reversed(trail):
            picks.append(int(picked[state]))
            state = int(parent[state])
        return (total, picks[::-1]), exact
