"""The goals of the GPU bench: ratios of times that rows should reach, and which of them do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.conv import SUMS
from bench.gpu.rows import OURS, OURS_GRAPH, Row, best_of_ours, row_name
from bench.gpu.sampling import FORWARDS
from bench.gpu.train_run import CAPTURED, RUN, STAGE1
from bench.gpu.unet import COMPILED

EIGHT_EVEN = {"num_groups": 8, "uneven": False}  # the groups of rows that goals are about
# Milliseconds of forward, dgrad and wgrad.
CONV_SUMS = {"CIFAR-10": (1.9, 1.9, 2.4), "ImageNet64": (6.6, 6.7, 7.5)}
NORM_SIZES = {"32 MB and more": (32.0, math.inf), "8 to 32 MB": (8.0, 32.0)}
LOOPS = ("loop", "loop, graph", "streams", "streams, graph", "compiled loop")


@dataclass(frozen=True)
class Goal:
    """A ratio that rows should reach.

    Attributes:
        name: what the ratio is, as the table shows it.
        labels: section, direction and so on of the rows that the goal is about.
        value: the ratio of such a row; None for one that the goal is not about after all or that lacks a peer.
        limit: the ratio to reach.
        at_least: whether a larger ratio is better.
    """

    name: str
    labels: Mapping[str, Any]
    value: Callable[[Row], float | None]
    limit: float
    at_least: bool

    def is_about(self, row: Row) -> bool:
        """Whether the row has the labels; one that failed has no others."""
        return all(row.get(key) == value for key, value in self.labels.items())

    def met(self, value: float) -> bool:
        """Whether the ratio `value` reaches the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


def _best_loop(row: Row) -> float | None:
    times = [row["ms"][name] for name in LOOPS if name in row["ms"]]
    return min(times, default=None)


def _unet(what: str) -> dict[str, Any]:
    """The labels of whole experts' rows."""
    return {"section": "unet", **EIGHT_EVEN, "width": 1.0, "direction": what}


def _over_best_loop(row: Row) -> float | None:
    loop = _best_loop(row)
    return None if loop is None else loop / best_of_ours(row)


def _quotient(name: str, ours: str = OURS) -> Callable[[Row], float | None]:
    return lambda row: row["ms"][ours] / row["ms"][name] if {name, ours} <= row["ms"].keys() else None


def _speed_of_cudnn(row: Row) -> float | None:
    times = row["ms"]
    if row["filter"] != 3 or not {"dense, graph", OURS_GRAPH} <= times.keys():
        return None
    return times["dense, graph"] / times[OURS_GRAPH]


def _of_large(row: Row) -> float | None:
    """The share of the cost of full width, of the large shapes that the kernels were designed for."""
    return row["ratios"].get("full width, graph") if row["source"] == "design" else None


def _pruned(row: Row) -> float | None:
    """What a UNet of pruned experts costs, over its share of the MACs."""
    full = row["ratios"].get("full width, graph")
    return None if full is None else full / row["share_of_macs"]


def _entry(kind: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: row[kind].get(name)


def _of_sum(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["ms"][OURS_GRAPH] if row["source"] == name else None


def _norm_of_copy(least: float, most: float) -> Callable[[Row], float | None]:
    """Of tensors of `least` to less than `most` megabytes."""
    return lambda row: row["net_of_copy"] if least <= row["megabytes"] < most else None


def _small_norm(row: Row) -> float | None:
    return row["net_us"] if 4 <= max(row["size"]) <= 8 else None


_TO_COMPILED = _quotient(COMPILED, OURS_GRAPH)
_FORWARD, _STEP, _RUN = _unet("forward"), _unet("training step"), {"section": "training", "direction": RUN}
_SAMPLING, _NORM = {"section": "sampling"}, {"section": "group norm", "width": 1.0}

GOALS = (
    Goal("UNet forward, N = 8, graphs: time / compiled dense", _FORWARD, _TO_COMPILED, 0.75, False),
    Goal("UNet forward, N = 8, graphs: the same, further goal", _FORWARD, _TO_COMPILED, 0.6, False),
    Goal("UNet training step, N = 8, graphs: time / compiled dense", _STEP, _TO_COMPILED, 0.75, False),
    Goal("tdc_fast.train, stage 2: time / captured step", _RUN, _entry("ratios", CAPTURED), 1.05, False),
    Goal("tdc_fast.train, stage 2: steps per second (H200)", _RUN, _entry("steps_per_s", OURS), 26.5, True),
    Goal("tdc_fast.train, stage 1: steps per second (H200)", _RUN, _entry("steps_per_s", STAGE1), 44.0, True),
    Goal("Sampling, DDIM-50: time / 50 captured forwards", _SAMPLING, _entry("ratios", FORWARDS), 1.1, False),
    Goal("UNet forward, N = 8: time / dense, both eager", _FORWARD, _quotient("dense"), 1.0, False),
    Goal("UNet forward, N = 8: in a graph / dense, eager", _FORWARD, _quotient("dense", OURS_GRAPH), 1.0, False),
    Goal("UNet forward, N = 8: best loop peer / ours at best", _FORWARD, _over_best_loop, 2.0, True),
    Goal("UNet training step, N = 8: best loop peer / ours", _STEP, _over_best_loop, 1.5, True),
    *(
        Goal(
            f"3x3 layers, N = 8: speed of dense cuDNN, {what}, both in a graph",
            {"section": "conv", **EIGHT_EVEN, "width": 1.0, "direction": what},
            _speed_of_cudnn,
            1.0,
            True,
        )
        for what in ("forward", "dgrad", "wgrad")
    ),
    *(
        Goal(
            f"Large convolutions at {width:.0%} widths, N = 8: cost / full width",
            {"section": "conv", **EIGHT_EVEN, "width": width},
            _of_large,
            limit,
            False,
        )
        for width, limit in ((0.5, 0.30), (0.75, 0.62))
    ),
    Goal(
        "UNet forward at 50% widths, graphs: (time / full width) / share of MACs",
        {"section": "unet", "direction": "forward", "width": 0.5},
        _pruned,
        1.1,
        False,
    ),
    Goal(
        "Convolutions, half of the batch in one of 8 groups: time / even groups",
        {"section": "conv", "num_groups": 8, "uneven": True, "width": 1.0},
        lambda row: row.get("of_even"),
        1.15,
        False,
    ),
    Goal(
        "UNet, 64 experts: time / 8 experts, graphs",
        {"section": "growth", "num_groups": 64},
        lambda row: row.get("of_eight"),
        1.1,
        False,
    ),
    *(
        Goal(
            f"{name}, sum of its convolutions, {what}: ms less an empty launch each (H200)",
            {"section": SUMS, "direction": what},
            _of_sum(name),
            limit,
            False,
        )
        for name, limits in CONV_SUMS.items()
        for what, limit in zip(("forward", "dgrad", "wgrad"), limits, strict=True)
    ),
    *(
        Goal(
            f"Group norm {what}, {size}: bandwidth less an empty launch / copy",
            {**_NORM, "direction": what},
            _norm_of_copy(*bounds),
            limit,
            True,
        )
        for what, limits in (("forward", (0.75, 0.6)), ("backward", (0.6, 0.5)))
        for (size, bounds), limit in zip(NORM_SIZES.items(), limits, strict=True)
    ),
    Goal("Group norm, 4x4 to 8x8: microseconds less an empty launch (H200)", _NORM, _small_norm, 3.0, False),
)


def _with_pairs(rows: list[Row]) -> list[Row]:
    """The rows, with `of_even` and `of_eight`: time in a graph over that of even groups, and of eight experts."""
    times = {_case(row): row["ms"][OURS_GRAPH] for row in rows if OURS_GRAPH in row["ms"]}

    def pair(row: Row, name: str, **others: Any) -> Row:
        other = times.get(_case(row | others))
        return row if other is None or OURS_GRAPH not in row["ms"] else row | {name: row["ms"][OURS_GRAPH] / other}

    return [pair(pair(row, "of_even", uneven=False), "of_eight", num_groups=8) for row in rows]


def _case(row: Row) -> tuple[Any, ...]:
    keys = ("section", "layer", "direction", "width", "mixed", "num_groups", "uneven")
    return tuple(row.get(key) for key in keys)


def judge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each goal: how many rows have its ratio, how many meet it, median and worst, and the worst that miss it.

    `failed` counts the rows with the goal's labels that failed or are wrong: of them nothing is known.
    """
    rows = list(rows)
    usable = _with_pairs([row for row in rows if "failed" not in row and not row["wrong"]])
    unusable = [row for row in rows if "failed" in row or row["wrong"]]
    verdicts = []
    for goal in GOALS:
        about = [row for row in usable if goal.is_about(row)]
        values = [(value, row) for row in about if (value := goal.value(row)) is not None]
        missed = [(value, row) for value, row in values if not goal.met(value)]
        missed.sort(key=lambda pair: pair[0], reverse=not goal.at_least)
        numbers = [value for value, _ in values]
        verdicts.append({
            "goal": goal.name,
            "limit": f"{'>=' if goal.at_least else '<='} {goal.limit}",
            "rows": len(values),
            "met": len(values) - len(missed),
            "failed": sum(map(goal.is_about, unusable)),
            "median": statistics.median(numbers) if numbers else None,
            "worst": (min(numbers) if goal.at_least else max(numbers)) if numbers else None,
            "missed": [{"row": row_name(row), "value": value} for value, row in missed[:12]],
        })  # fmt: skip
    return verdicts
