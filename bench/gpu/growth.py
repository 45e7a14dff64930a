"""How the time of a whole UNet grows with the number of experts and with the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.files import markdown_rows
from bench.gpu import unet
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun, Row, measure
from bench.gpu.timing import Budget, Candidate

GROUPS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (256, 16, 512, 128, 32)
BATCH = 64
DENSE, COMPILED = "dense, graph", unet.COMPILED


def cases(*, tiny: bool) -> Iterator[tuple[int, int, str]]:
    """(N, B, what) of every row, forwards first."""
    if tiny:
        yield from ((8, 8, "forward"), (1, 8, "forward"), (8, 4, "training step"))
        return
    for what in ("forward", "training step"):
        yield from ((n, BATCH, what) for n in GROUPS)
        yield from ((8, batch, what) for batch in BATCHES)


def row_of(run: BenchRun, flags: dict[str, Any], n: int, batch: int, what: str) -> dict[str, Any]:
    """Time a size and return the fields of its row; the compiled dense model once per batch, in forward."""
    problem = unet.Problem(run, flags, batch, unet.Case("", what, n))
    ours, dense = problem.calls_of(problem.routed), problem.calls_of(problem.base)
    makers: dict[str, Callable[[], Candidate]] = {
        OURS: lambda: ours,
        OURS_GRAPH: lambda: run.machine.captured(ours),
        DENSE: lambda: run.machine.captured(dense),
    }
    if n == 8 and what == "forward":
        makers[COMPILED] = lambda: unet.compiled(problem, problem.base)
    error = problem.error()
    with torch.set_grad_enabled(what != "forward"):
        result = measure(run, makers, flush=False, compiles=(COMPILED,))
    wrong = not error <= unet.WRONG
    return {"batch": batch, "backend": run.backend or "fastest", "error": error, "wrong": wrong, **result}


def run_section(run: BenchRun, name: str, flags: dict[str, Any], budget: Budget) -> None:
    """Adds rows until all are done or the budget is spent."""
    for n, batch, what in cases(tiny=run.tiny):
        labels = {"num_groups": n, "uneven": False, "width": 1.0, "direction": what}
        run.row("growth", f"{name}, B {batch}", labels, budget, partial(row_of, run, flags, n, batch, what))


def table(rows: list[Row]) -> list[str]:
    """Milliseconds in a graph by N and B; a dense model's of the same batch stand beside every N.

    Args:
        rows: those of this section that did not fail.
    """
    dense: dict[tuple[str, int, str], float] = {}
    for row in rows:
        for name in (DENSE, COMPILED):
            if name in row["ms"]:
                dense.setdefault((row["direction"], row["batch"], name), row["ms"][name])
    lines = []
    for row in sorted(rows, key=lambda row: (row["direction"], row["batch"], row["num_groups"])):
        ours = row["ms"].get(OURS_GRAPH)
        cells = [row["direction"], str(row["batch"]), str(row["num_groups"]), "" if ours is None else f"{ours:.2f}"]
        for name in (DENSE, COMPILED):
            peer = dense.get((row["direction"], row["batch"], name))
            cells.append("" if peer is None else f"{peer:.2f}")
            cells.append("" if peer is None or ours is None else f"{ours / peer:.2f}")
        lines.append([*cells, "" if ours is None else f"{1e3 * row['batch'] / ours:.0f}"])
    header = ["", "B", "N", "routed ms", "dense ms", "x dense", "compiled dense ms", "x compiled dense", "images/s"]
    return markdown_rows(header, lines)
