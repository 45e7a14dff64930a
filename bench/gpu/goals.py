"""The goals of the GPU bench: ratios of times that rows should reach, and which of them do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.gpu.rows import OURS, OURS_GRAPH, Row, best_of_ours, row_name
from bench.gpu.sampling import FORWARDS
from bench.gpu.train_run import CAPTURED, RUN, STAGE1
from bench.gpu.unet import COMPILED

EIGHT_EVEN = {"num_groups": 8, "uneven": False}  # the groups of rows that goals are about
LOOPS = ("loop", "loop, graph", "streams", "streams, graph", "compiled loop")


@dataclass(frozen=True)
class Goal:
    """A ratio that rows should reach.

    Attributes:
        name: what the ratio is, as the table shows it.
        value: the ratio of a row; None for a row that the goal is not about or that lacks a peer.
        limit: the ratio to reach.
        at_least: whether a larger ratio is better.
    """

    name: str
    value: Callable[[Row], float | None]
    limit: float
    at_least: bool

    def met(self, value: float) -> bool:
        """Whether the ratio `value` reaches the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


def _best_loop(row: Row) -> float | None:
    times = [row["ms"][name] for name in LOOPS if name in row["ms"]]
    return min(times, default=None)


def _is(row: Row, section: str, **labels: Any) -> bool:
    return row["section"] == section and all(row.get(key) == value for key, value in labels.items())


def _unet(what: str, measure: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
    return lambda row: measure(row) if _is(row, "unet", **EIGHT_EVEN, width=1.0, direction=what) else None


def _over_best_loop(row: Row) -> float | None:
    loop = _best_loop(row)
    return None if loop is None else loop / best_of_ours(row)


def _quotient(name: str, ours: str = OURS) -> Callable[[Row], float | None]:
    return lambda row: row["ms"][ours] / row["ms"][name] if {name, ours} <= row["ms"].keys() else None


def _speed_of_cudnn(direction: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        if not _is(row, "conv", **EIGHT_EVEN, width=1.0, filter=3, direction=direction):
            return None
        times = row["ms"]
        return times["dense, graph"] / times[OURS_GRAPH] if {"dense, graph", OURS_GRAPH} <= times.keys() else None

    return value


def _cost_at(width: float) -> Callable[[Row], float | None]:
    """The share of the cost of full width, of the large shapes that the kernels were designed for."""

    def value(row: Row) -> float | None:
        concerned = _is(row, "conv", **EIGHT_EVEN, width=width, source="design")
        return row["ratios"].get("full width, graph") if concerned else None

    return value


def _of_run(kind: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: row[kind].get(name) if _is(row, "training", direction=RUN) else None


def _of_forwards(row: Row) -> float | None:
    return row["ratios"].get(FORWARDS) if _is(row, "sampling") else None


def _of_copy(row: Row) -> float | None:
    return row["of_copy"] if _is(row, "group norm", width=1.0) else None


_TO_COMPILED = _quotient(COMPILED, OURS_GRAPH)

GOALS = (
    Goal("UNet forward, N = 8, graphs: time / compiled dense", _unet("forward", _TO_COMPILED), 0.75, False),
    Goal("UNet training step, N = 8, graphs: time / compiled dense", _unet("training step", _TO_COMPILED), 0.75, False),
    Goal("tdc_fast.train, stage 2: time / captured step", _of_run("ratios", CAPTURED), 1.05, False),
    Goal("tdc_fast.train, stage 2: steps per second (H200)", _of_run("steps_per_s", OURS), 26.5, True),
    Goal("tdc_fast.train, stage 1: steps per second (H200)", _of_run("steps_per_s", STAGE1), 44.0, True),
    Goal("Sampling, DDIM-50: time / 50 captured forwards", _of_forwards, 1.1, False),
    Goal("UNet forward, N = 8: time / dense, both eager", _unet("forward", _quotient("dense")), 1.0, False),
    Goal(
        "UNet forward, N = 8: in a graph / dense, eager", _unet("forward", _quotient("dense", OURS_GRAPH)), 1.0, False
    ),
    Goal("UNet forward, N = 8: best loop peer / ours at best", _unet("forward", _over_best_loop), 2.0, True),
    Goal("UNet training step, N = 8: best loop peer / ours", _unet("training step", _over_best_loop), 1.5, True),
    *(
        Goal(f"3x3 layers, N = 8: speed of dense cuDNN, {what}, both in a graph", _speed_of_cudnn(what), 1.0, True)
        for what in ("forward", "dgrad", "wgrad")
    ),
    Goal("Large convolutions at 50% widths, N = 8: cost / full width", _cost_at(0.5), 0.30, False),
    Goal("Large convolutions at 75% widths, N = 8: cost / full width", _cost_at(0.75), 0.62, False),
    Goal("Group norm: bandwidth / measured copy", _of_copy, 0.85, True),
)


def judge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each goal: how many rows it is about, how many meet it, median and worst, and the worst rows that miss it."""
    usable = [row for row in rows if "failed" not in row and not row["wrong"]]
    verdicts = []
    for goal in GOALS:
        values = [(value, row) for row in usable if (value := goal.value(row)) is not None]
        missed = [(value, row) for value, row in values if not goal.met(value)]
        missed.sort(key=lambda pair: pair[0], reverse=not goal.at_least)
        numbers = [value for value, _ in values]
        verdicts.append({
            "goal": goal.name,
            "limit": f"{'>=' if goal.at_least else '<='} {goal.limit}",
            "rows": len(values),
            "met": len(values) - len(missed),
            "median": statistics.median(numbers) if numbers else None,
            "worst": (min(numbers) if goal.at_least else max(numbers)) if numbers else None,
            "missed": [{"row": row_name(row), "value": value} for value, row in missed[:12]],
        })  # fmt: skip
    return verdicts
