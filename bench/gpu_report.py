"""The GPU bench's files: JSON with everything, Markdown with the tables and the goals, met or missed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.gpu_rows import OURS, OURS_GRAPH, best_of_ours

Row = dict[str, Any]
EIGHT_EVEN = {"num_groups": 8, "uneven": False}  # the groups that goals are about
LOOPS = ("loop", "loop, graph", "streams", "streams, graph", "compiled loop")


@dataclass(frozen=True)
class Goal:
    """A ratio that a row should reach. `value` is None for rows that it does not concern or that lack a peer."""

    name: str
    value: Callable[[Row], float | None]
    limit: float
    at_least: bool

    def met(self, value: float) -> bool:
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


def _speed_of_cudnn(row: Row) -> float | None:
    if not _is(row, "conv", **EIGHT_EVEN, width=1.0, filter=3, direction="forward"):
        return None
    times = row["ms"]
    return times["dense, graph"] / times[OURS_GRAPH] if {"dense, graph", OURS_GRAPH} <= times.keys() else None


def _half_width_cost(row: Row) -> float | None:
    concerned = _is(row, "conv", **EIGHT_EVEN, width=0.5) and min(row["channels"]) >= 16  # image channels stay
    return row["ratios"].get("full width, graph") if concerned else None


def _of_copy(row: Row) -> float | None:
    return row["of_copy"] if _is(row, "group norm", width=1.0) else None


GOALS = (
    Goal("UNet forward, N = 8: time / dense, both eager", _unet("forward", _quotient("dense")), 1.0, False),
    Goal(
        "UNet forward, N = 8: in a graph / dense, eager", _unet("forward", _quotient("dense", OURS_GRAPH)), 1.0, False
    ),
    Goal("UNet forward, N = 8: best loop peer / ours at best", _unet("forward", _over_best_loop), 2.0, True),
    Goal("UNet training step, N = 8: best loop peer / ours", _unet("training step", _over_best_loop), 1.5, True),
    Goal("3x3 layers, N = 8: speed of dense cuDNN, forward, both in a graph", _speed_of_cudnn, 0.9, True),
    Goal("Convolutions at 50% widths, N = 8: cost / full width", _half_width_cost, 0.35, False),
    Goal("Group norm: bandwidth / measured copy", _of_copy, 0.85, True),
)


def judge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Per goal: how many rows it concerns, how many meet it, median and worst, and the rows that miss it."""
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
            "missed": [{"row": _name(row), "value": value} for value, row in missed[:12]],
        })  # fmt: skip
    return verdicts


def _name(row: Row) -> str:
    uneven = ", uneven" if row.get("uneven") else ""
    return f"{row['layer']} {row['direction']}, N {row['num_groups']}{uneven}, {row['width']:.0%}"


def as_markdown(results: dict[str, Any]) -> str:
    device, versions = results["device"], results["versions"]
    ceilings = results["ceilings"]
    lines = [
        f"# Throughput on {device['name']}, {results['dtype']}",
        "",
        f"{results['date']}, `{results['command']}`, {results['seconds']:.0f} s; torch {versions['torch']}, CUDA "
        f"{versions['cuda']}, cuDNN {versions['cudnn']}, triton {versions['triton']}, driver {versions['driver']}.",
        f"Measured ceilings: copy {ceilings['copy_TBps']:.2f} TB/s, bf16 matrix product "
        f"{ceilings['matmul_TFLOPps']:.0f} TFLOP/s. Clocks before: {_clocks(results['clocks_before'])}; "
        f"after: {_clocks(results['clocks_after'])}.",
        "",
        "Medians in milliseconds over interleaved rounds; `x` columns are ours / peer (a peer in a CUDA graph against "
        "ours in one), medians of per-round quotients: below 1 is faster. The L2 is flushed before every timed layer. "
        "The loop peers get their samples sorted and their segments' bounds for free; *dense* is one expert over the "
        "whole batch. In the goals, ours is the faster of eager and in a graph, as is every loop peer.",
    ]
    if results["dry_run"]:
        lines += ["", "**A dry run: tiny shapes on the CPU. No number here means anything.**"]
    lines += ["", "## Goals", "", *_goal_table(results["goals"])]
    for row in results["rows"]:
        if "failed" in row:
            lines.append(f"* failed: {row['section']}, {_name(row)}: {row['failed']}")
        elif row["wrong"]:
            lines.append(f"* **wrong result** (relative error {row['error']:.2g}): {row['section']}, {_name(row)}")
    for section, count in results["not_run"].items():
        lines.append(f"* not run for want of time: {count} rows of {section}")
    for section in ("unet", "conv", "group norm"):
        rows = [row for row in results["rows"] if row["section"] == section and "failed" not in row]
        for source in dict.fromkeys(row.get("source", "") for row in rows):
            part = [row for row in rows if row.get("source", "") == source]
            lines += ["", f"## {section} {source}".rstrip(), "", *_table(part)]
    return "\n".join(lines) + "\n"


def _clocks(clocks: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in clocks.items()) or "not known"


def _goal_table(verdicts: list[dict[str, Any]]) -> list[str]:
    lines = [_line(["goal", "limit", "", "met by", "median", "worst"]), _line(["---"] * 6)]
    for v in verdicts:
        verdict = "not measured" if not v["rows"] else "met" if v["met"] == v["rows"] else "missed"
        numbers = ["" if v[key] is None else f"{v[key]:.2f}" for key in ("median", "worst")]
        lines.append(_line([v["goal"], v["limit"], verdict, f"{v['met']} of {v['rows']}", *numbers]))
    lines.append("")
    for v in verdicts:
        lines += [f"* misses «{v['goal']}» with {miss['value']:.2f}: {miss['row']}" for miss in v["missed"]]
    return lines


def _table(rows: list[Row]) -> list[str]:
    """Candidates that any row has become columns."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    rates = [key for key in ("TFLOPps", "TBps", "of_copy") if any(key in row for row in rows)]
    header = ["case", "backend", *rates, *(f"{n} ms" for n in names), *(f"x {p}" for p in peers)]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = [_name(row), str(row["backend"]), *(_cell(row, key, 2 if key != "TFLOPps" else 0) for key in rates)]
        cells += [_cell(row["ms"], name, 4) for name in names]
        lines.append(_line(cells + [_cell(row["ratios"], name, 2) for name in peers]))
    absent = {f"{name}: {reason}" for row in rows for name, reason in row["absent"].items()}
    return lines + ([""] if absent else []) + [f"* absent: {text}" for text in sorted(absent)]


def _cell(values: dict[str, Any], key: str, digits: int) -> str:
    return f"{values[key]:.{digits}f}" if key in values else ""


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
