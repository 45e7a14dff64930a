"""The exact best division of a sequence of items into contiguous intervals, and how many intervals are enough.

The cost of a division is the sum over its intervals of a cost that depends on the interval alone, such as the scatter
of its items around their mean. Dynamic programming finds the cheapest division into each number of intervals:
    best(n, j) = min over i < j of best(n - 1, i) + cost(i, j)
(W. D. Fisher, "On Grouping for Maximum Homogeneity", 1958).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tdc_fast.errors import integer, invalid


@dataclass(frozen=True)
class Division:
    """The cheapest division of P items into contiguous intervals.

    Attributes:
        cuts: (N + 1,) from 0 to P; interval g holds the items [cuts[g], cuts[g + 1]).
        costs: the cheapest total for 1, 2, ... intervals, as far as computed; it never rises.
    """

    cuts: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def num_intervals(self) -> int:
        """N."""
        return len(self.cuts) - 1


def scatter_of_similarity(similarity: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Cost of every interval [i, j) of unit vectors with these inner products: (P + 1, P + 1), infinite for j <= i.

    It is the weighted squared distance of the vectors from their mean: W - (sum of w_a w_b <u_a, u_b>) / W, with W the
    sum of the weights.

    Args:
        similarity: cosines of the vectors, (P, P).
        weights: (P,) above 0; None for 1.

    Raises:
        ValueError: an argument has another shape or impossible values.
    """
    matrix = np.asarray(similarity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix) or not np.isfinite(matrix).all():
        raise invalid("similarity", f"shape {matrix.shape}", "a square matrix of finite cosines")
    w = _weights(weights, len(matrix))
    block = np.zeros((len(matrix) + 1,) * 2)
    block[1:, 1:] = (matrix * w[:, None] * w[None]).cumsum(0).cumsum(1)
    total = np.concatenate([[0.0], w.cumsum()])
    corner = block.diagonal()
    inside = corner[None] - block - block.T + corner[:, None]  # sum over [i, j) x [i, j)
    return _per_interval(total[None] - total[:, None], lambda mass: mass - inside / mass)


def scatter_of_values(values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Cost of every interval [i, j) of numbers, (P + 1, P + 1): weighted squared distance from their mean.

    Args:
        values: (P,).
        weights: (P,) above 0; None for 1.

    Raises:
        ValueError: an argument has another shape or impossible values.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or not len(v) or not np.isfinite(v).all():
        raise invalid("values", f"shape {v.shape}", "a sequence of finite numbers")
    w = _weights(weights, len(v))
    v = v - np.average(v, weights=w)  # centred, since large sums of squares lose digits
    total, first, second = (np.concatenate([[0.0], s.cumsum()]) for s in (w, w * v, w * v * v))

    def scatter(mass: np.ndarray) -> np.ndarray:
        return (second[None] - second[:, None]) - (first[None] - first[:, None]) ** 2 / mass

    return _per_interval(total[None] - total[:, None], scatter)


def divide(
    cost: np.ndarray, num_intervals: int | None, *, max_intervals: int = 10, near: Sequence[int] = (), within: int = 0
) -> Division:
    """The cheapest division of P items; of equally cheap ones that with the earlier cuts, compared from the last cut.

    Args:
        cost: cost of every interval [i, j), (P + 1, P + 1).
        num_intervals: N, or None for the elbow among 1 to `max_intervals` (see `elbow`).
        max_intervals: the largest number that the elbow may choose.
        near: cuts (N + 1,) given by hand, or nothing.
        within: how many items every inner cut may move away from `near`.

    Raises:
        ValueError: N is not in [1, P], or `near` does not fit it.
    """
    items = len(cost) - 1
    choosing = num_intervals is None
    if num_intervals is None:
        most = min(integer("max_groups", max_intervals), items)
    else:
        most = integer("num_groups", num_intervals, 1, items)
    if near and (choosing or len(near) != most + 1 or within < 0):
        raise invalid("near", near, f"{most + 1} cuts, and a distance of at least 0")
    best = np.full((most + 1, items + 1), np.inf)
    start = np.zeros((most + 1, items + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for n in range(1, most + 1):
        totals = best[n - 1][:, None] + cost  # [start, end)
        start[n] = totals.argmin(0)
        best[n] = totals.min(0)
        if near and n < most:
            away = np.abs(np.arange(items + 1) - near[n]) > within
            best[n, away] = np.inf
    costs = tuple(max(float(total), 0.0) for total in best[1:, items])
    chosen = elbow(costs) if choosing else most
    cuts = [items]
    for n in range(chosen, 0, -1):
        cuts.append(int(start[n, cuts[-1]]))
    return Division(tuple(reversed(cuts)), costs)


def elbow(costs: Sequence[float]) -> int:
    """The number of intervals beyond which more intervals save little.

    It is the point furthest below the straight line from the first point (1, costs[0]) to the last; 1 if no point lies
    below it.

    Args:
        costs: the cheapest total for 1, 2, ... intervals.

    Raises:
        ValueError: there are no costs.
    """
    values = np.asarray(costs, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise invalid("costs", costs, "the cheapest total for 1, 2, ... intervals")
    below = np.linspace(values[0], values[-1], len(values)) - values
    return int(below.argmax()) + 1


def _weights(weights: np.ndarray | None, count: int) -> np.ndarray:
    w = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (count,) or not (w > 0).all():
        raise invalid("weights", f"shape {w.shape}", f"{count} numbers above 0")
    return w


def _per_interval(mass: np.ndarray, scatter: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """At least 0 and `scatter(mass)` where the interval [i, j) is not empty; infinite elsewhere."""
    size = len(mass)
    filled = np.triu(np.ones((size, size), dtype=bool), 1)
    values = scatter(np.where(filled, mass, 1.0))
    return np.where(filled, np.maximum(values, 0.0), np.inf)
