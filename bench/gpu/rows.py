"""One row of the GPU bench: the candidates of a case, timed interleaved, as medians and like-for-like ratios."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu.timing import Budget, Candidate, Machine, TookTooLong, at_most, median_ratio

OURS, OURS_GRAPH = "ours", "ours, graph"
Row = dict[str, Any]
Makers = Mapping[str, Callable[[], Candidate]]
# A candidate or row that fails must not end the run, whatever its error: Triton's are not RuntimeErrors.
FAILURES = (Exception, TookTooLong)


@dataclass
class BenchRun:
    """What every section needs, and the rows measured so far.

    Attributes:
        machine: the device.
        backend: the requested backend; None for the fastest.
        dtype: of the tensors.
        row_seconds: about how long the rounds of a row take.
        compile_seconds: limit for one torch.compile peer.
        tiny: a dry run: one round, tiny shapes.
        rows: the rows.
        not_run: rows per section for which there was no time.
        under_way: the section, layer and labels of the row being measured; "" between rows.
        row_limit: seconds that no row takes unless a kernel hangs.
        give_up: called in another thread when a row has taken longer; None: nothing is.
    """

    machine: Machine
    backend: str | None
    dtype: torch.dtype
    row_seconds: float
    compile_seconds: float
    tiny: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: dict[str, int] = field(default_factory=dict)
    under_way: str = ""
    row_limit: float = 0.0
    give_up: Callable[[], None] | None = None

    def row(
        self, section: str, layer: str, labels: dict[str, Any], budget: Budget, measured: Callable[[], dict[str, Any]]
    ) -> None:
        """Adds one row, or counts it as not run when the budget is spent; a failure is printed and kept as a row.

        Args:
            section: the section of the report.
            layer: what was timed, for the report.
            labels: groups, width and direction.
            budget: the section's time.
            measured: times the row and returns its fields.
        """
        if budget.left() <= 0:
            self.not_run[section] = self.not_run.get(section, 0) + 1
            return
        row: dict[str, Any] = {"section": section, "layer": layer, **labels}
        self.under_way = f"{section}, {layer}, {labels}"
        hanging = threading.Timer(self.row_limit, self.give_up) if self.give_up else None
        if hanging:
            hanging.daemon = True
            hanging.start()
        try:
            row |= measured()
        except FAILURES as error:
            row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            print(f"failed: {self.under_way}: {row['failed']}", flush=True)
        finally:
            if hanging:
                hanging.cancel()
            self.under_way = ""
        self.rows.append(row)
        try:
            self.give_memory_back()
        except RuntimeError as error:  # after a CUDA error or a failed capture
            print(f"memory could not be released: {error}", flush=True)

    def give_memory_back(self) -> None:
        """Releases memory pools of deleted graphs, which torch keeps otherwise, when memory gets short."""
        if self.machine.is_cuda:
            free, total = torch.cuda.mem_get_info()
            if free < total // 2:
                gc.collect()
                torch.cuda.empty_cache()

    def generator(self) -> torch.Generator:
        """A generator on the device with seed 0."""
        return torch.Generator(self.machine.device).manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0, generator: torch.Generator) -> Tensor:
        """Normal values in the dtype of the run."""
        values = torch.randn(shape, generator=generator, device=self.machine.device)
        return (values * scale).to(self.dtype)


def row_name(row: Row) -> str:
    """A row's layer, direction, groups and width, in one line."""
    uneven = ", uneven" if row.get("uneven") else ""
    width = f"{row['width']:.0%}" if not row.get("mixed") else "mixed widths"
    return f"{row['layer']} {row['direction']}, N {row['num_groups']}{uneven}, {width}"


def is_graph(name: str) -> bool:
    """Whether the candidate of this name runs in a CUDA graph."""
    return name.endswith(", graph")


def measure(
    run: BenchRun,
    makers: Makers,
    *,
    flush: bool = True,
    compiles: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Make and time the candidates.

    If our eager candidate fails, that is an error; any other candidate that fails is listed as absent.

    Args:
        run: the device and its settings.
        makers: functions that make the candidates, by name.
        flush: overwrite the L2 before every call.
        compiles: names of candidates that torch.compile makes, for which the time is limited.

    Returns:
        `ms` (median per candidate), `spread` (interquartile range over median), `ratios` (ours / peer; a peer in a
        graph is compared with ours in a graph, where there is one), `absent` (reason per candidate), `rounds`, and
        `first_call_s` (compilation of ours).
    """
    candidates: dict[str, Candidate] = {}
    absent: dict[str, str] = {}
    start = time.perf_counter()
    for name, make in makers.items():
        if name == OURS:
            candidates[name] = make()
            candidates[name]()
            run.machine.synchronize()
            first_call = time.perf_counter() - start
            continue
        try:
            if name in compiles:
                with at_most(run.compile_seconds):
                    candidates[name] = make()
            else:
                candidates[name] = make()
                candidates[name]()
            run.machine.synchronize()
        except FAILURES as error:
            candidates.pop(name, None)
            absent[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    least = 1 if run.tiny else 5
    times = run.machine.times(candidates, flush=flush, seconds=run.row_seconds, least=least)
    ratios = {}
    for name in candidates:
        ours = OURS_GRAPH if is_graph(name) and OURS_GRAPH in candidates else OURS
        if not name.startswith(OURS):
            ratios[name] = median_ratio(times[ours], times[name])
    return {
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: _spread(values) for name, values in times.items()},
        "ratios": ratios,
        "absent": absent,
        "rounds": len(times[OURS]),
        "first_call_s": round(first_call, 3),
    }


def best_of_ours(row: Mapping[str, Any]) -> float:
    """Our better time of eager and in a graph, in milliseconds."""
    return min(row["ms"][OURS], row["ms"].get(OURS_GRAPH, float("inf")))


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in fp64; NaN stays NaN, which fails every comparison."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()
