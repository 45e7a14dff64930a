"""`python -m bench.serving.simulation`: latency by batch size and policy, simulated from measured times of steps.

Nothing is served. A virtual clock advances by the time that a step of so many places was measured to take, and the
engine's own policy chooses who takes part in it. So every row sees the same machine, and thousands of requests take
seconds. What the machine does besides (other load, threads that wait for each other) is not in it;
`python -m bench.serving` measures that.
"""

from __future__ import annotations

import argparse
import functools
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.files import ROOT, device, markdown_rows, slug, whole_number, write_results
from bench.serving.__main__ import machine_of, shares
from bench.serving.contestants import MODELS, Contestant, Problem, whole_requests
from bench.serving.loads import random_request
from tdc_fast.serving import Engine, Policy, Request
from tdc_fast.serving.live import LiveRequest, Plan
from tdc_fast.serving.policy import PolicyName

StepTime = Callable[[int], float]
Clock = Callable[[], float]
Arrival = tuple[float, Request]
POLICIES: tuple[PolicyName, ...] = ("slack", "fifo", "shortest")
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def engine_step_time(make: Callable[[], Contestant], rows: int, clock: Clock, *, steps: int = 48) -> float:
    """Seconds per step of an engine that has so many places, where one request leaves and one joins in every step."""
    engine = make()
    assert isinstance(engine, Engine)
    for number in range(rows):
        engine.submit(Request(seed=number, steps=number % rows + 1))
    for number in range(steps):
        engine.submit(Request(seed=number, steps=rows))
    began = clock()
    engine.start()
    engine.close()
    return (clock() - began) / engine.statistics.steps


def request_level_step_time(make: Callable[[], Contestant], rows: int, clock: Clock, *, steps: int = 24) -> float:
    """Seconds per step of batches of so many whole requests."""
    server, batches = make(), 2
    for number in range(batches * rows):
        server.submit(Request(seed=number, steps=steps))
    began = clock()
    server.start()
    server.close()
    return (clock() - began) / (batches * steps)


def measure_steps(problem: Problem, repeats: int, clock: Clock) -> dict[str, list[list[float]]]:
    """Seconds per step by contestant: pairs of places and the least time of all repeats."""
    times: dict[str, dict[int, float]] = {"engine": {}, "request level": {}}
    for _ in range(repeats):
        for rows in ROWS:
            makers = problem.contestants(rows)
            for name, measure in (("engine", engine_step_time), ("request level", request_level_step_time)):
                seconds = measure(makers[name], rows, clock)
                times[name][rows] = min(seconds, times[name].get(rows, seconds))
    return {name: [[rows, seconds] for rows, seconds in table.items()] for name, table in times.items()}


def interpolated(table: Iterable[Iterable[float]]) -> StepTime:
    """The time of a step of any number of places, between and beyond those that were measured."""
    rows, seconds = np.array(list(table)).T
    slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])

    def step_time(count: int) -> float:
        beyond = max(0.0, count - rows[-1])
        return float(np.interp(count, rows, seconds) + slope * beyond)

    return step_time


def poisson(rate: float, count: int, seed: int) -> list[Arrival]:
    """So many requests of 10, 25 or 50 steps, at random times."""
    draw, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        arrivals.append((now, random_request(draw)))
    return arrivals


class Arrivals:
    """Requests that come at known times, or in a closed loop: one as soon as one has ended.

    Args:
        coming: times and requests, in order.
        clients: of a closed loop; then no time counts, and so many come at once. 0 for none.
    """

    def __init__(self, coming: list[Arrival], clients: int = 0) -> None:
        self._coming, self._next, self._is_closed = coming, 0, clients > 0
        self._due = clients
        self.seconds: list[float] = []  # latencies, in the order of ends

    def until(self, now: float) -> list[Arrival]:
        """Who has come since the last call."""
        first = self._next
        if self._is_closed:
            self._next = min(len(self._coming), first + self._due)
            self._due = 0
            return [(now, request) for _, request in self._coming[first : self._next]]
        while self._next < len(self._coming) and self._coming[self._next][0] <= now:
            self._next += 1
        return self._coming[first : self._next]

    def next_after(self, now: float) -> float | None:
        """When the next one comes; None if nobody does."""
        return max(now, self._coming[self._next][0]) if self._next < len(self._coming) else None

    def end(self, came: float, now: float) -> None:
        """A request that came at a time has ended."""
        self.seconds.append(now - came)
        self._due += 1


@functools.cache
def _plan(steps: int) -> Plan:
    """The plan of so many steps, of which only their number counts here."""
    return Plan(np.zeros(steps, np.int64), np.zeros((8, steps)), np.zeros(steps, np.int64), False, False)


def simulate_engine(arrivals: Arrivals, step_time: StepTime, policy: Policy, places: int) -> float:
    """Serve all requests in step-level batches; returns the time of the last end."""
    now, steps, count = 0.0, 0, 0
    live: list[LiveRequest] = []
    while True:
        for came, request in arrivals.until(now):
            live.append(LiveRequest(request, _plan(request.steps), count, steps, submitted=came))
            count += 1
        if not live:
            coming = arrivals.next_after(now)
            if coming is None:
                return now
            now = coming
            continue
        chosen = policy.choose_filled(live, places, (), 0.0)
        now += step_time(sum(one.rows for one in chosen))
        steps += 1
        for one in chosen:
            one.position += 1
            if not one.remaining:
                arrivals.end(one.submitted, now)
        live = [one for one in live if one.remaining]


def simulate_request_level(arrivals: Arrivals, step_time: StepTime, places: int) -> float:
    """Serve all requests in batches of whole requests; returns the time of the last end."""
    now, waiting = 0.0, list[Arrival]()
    while True:
        waiting += arrivals.until(now)
        if not waiting:
            coming = arrivals.next_after(now)
            if coming is None:
                return now
            now = coming
            continue
        chosen = set(whole_requests([request for _, request in waiting], places))
        batch = [entry for index, entry in enumerate(waiting) if index in chosen]
        waiting = [entry for index, entry in enumerate(waiting) if index not in chosen]
        now += batch[0][1].steps * step_time(sum(request.num_images for _, request in batch))
        for came, _ in batch:
            arrivals.end(came, now)


def simulate(steps: dict[str, Any], batches: list[int], loads: list[float], count: int) -> list[dict[str, Any]]:
    """Every size of batch at every load, with every policy, and request-level batches; loads as in the measurement."""
    engine, whole = (interpolated(steps[name]) for name in ("engine", "request level"))
    rows = []
    for places in batches:
        closed = poisson(1.0, max(count // 4, 20 * places), 0)
        capacity = len(closed) / max(
            simulate_engine(Arrivals(closed, 2 * places), engine, Policy(), places),
            simulate_request_level(Arrivals(closed, 2 * places), whole, places),
        )
        for load in loads:
            coming = poisson(load * capacity, count, 1)
            arrivals = Arrivals(coming)
            simulate_request_level(arrivals, whole, places)
            p50, p99 = np.percentile(arrivals.seconds, (50, 99))
            common = {"max_batch": places, "load": load, "images_per_second": round(load * capacity, 2)}
            rows.append({**common, "contestant": "request level", "p50": p50, "p99": p99, "ratio": 1.0})
            for policy in POLICIES:
                arrivals = Arrivals(coming)
                simulate_engine(arrivals, engine, Policy(policy), places)
                median, last = np.percentile(arrivals.seconds, (50, 99))
                name = f"engine, {policy}"
                rows.append({**common, "contestant": name, "p50": median, "p99": last, "ratio": last / p99})
    return rows


def as_markdown(results: dict[str, Any]) -> str:
    """The Markdown file: what was measured, and what was simulated from it."""
    settings, machine = results["settings"], results["machine"]
    lines = [
        f"# Serving simulated, with the steps of {machine['name']}",
        "",
        f"{results['date']}, `{results['command']}`; torch {results['versions']['torch']}, "
        f"model `{settings['model']}`, N = {settings['experts']}, float32, threads: {machine['threads']}.",
        "",
        "Times of steps were measured; the rest is a simulation, on a virtual clock that each step advances by its "
        "time. The engine's own policy chooses who takes part. Requests of one image in 10, 25 or 50 steps come at "
        f"random times, {settings['requests']} in each row, the same for all rows of a load. Loads are shares of what "
        "both ways of batching serve with 2 max_batch clients, also simulated.",
        "",
        f"## Measured: milliseconds per step ({settings['clock']})",
        "",
        "The engine's are with one request leaving and one joining in every step.",
        "",
    ]
    steps = results["step_seconds"]
    header = ["places", *(f"{rows:.0f}" for rows, _ in steps["engine"])]
    lines += markdown_rows(header, [[name, *(f"{s * 1e3:.2f}" for _, s in table)] for name, table in steps.items()])
    lines += ["", "## Simulated", ""]
    header = ["max_batch", "load", "images/s", "contestant", "p50 ms", "p99 ms", "p99 / request level"]
    rows = [
        [
            str(row["max_batch"]), f"{row['load']:.0%}", f"{row['images_per_second']:.0f}", row["contestant"],
            f"{row['p50'] * 1e3:.0f}", f"{row['p99'] * 1e3:.0f}", f"{row['ratio']:.2f}",
        ]
        for row in results["simulated"]
    ]  # fmt: skip
    return "\n".join([*lines, *markdown_rows(header, rows)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure the times of steps, simulate, print the table, and write a JSON and a Markdown file."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving.simulation", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="digits", help="the network")
    parser.add_argument("--experts", type=whole_number, default=8, help="N, the number of experts")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--batches", type=counts, default="16,32,64", help="comma list of max_batch")
    parser.add_argument("--loads", default="0.5,0.8,0.95", help="offered load as shares of the capacity")
    parser.add_argument("--requests", type=whole_number, default=20000, help="requests in each row")
    parser.add_argument(
        "--repeats", type=whole_number, default=3, help="measurements of a step, of which the least counts"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps the default of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the two files")
    parser.add_argument("--name", default="", help="file name without ending")
    options = parser.parse_args(argv)
    loads = shares(options.loads)
    if not loads:
        parser.error("--loads takes numbers above 0, separated by commas")
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    # One thread takes as long on an idle processor as it computes, whatever else the machine does now.
    clock = time.process_time if options.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    steps = measure_steps(
        Problem(options.model, options.experts, options.device, torch.float32), options.repeats, clock
    )
    print(f"steps measured in {time.monotonic() - began:.0f} s", flush=True)
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.serving.simulation", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine_of(options.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "model": options.model,
            "experts": options.experts,
            "requests": options.requests,
            "clock": "processor time" if clock is time.process_time else "real time",
        },
        "step_seconds": {name: [[r, round(s, 6)] for r, s in table] for name, table in steps.items()},
        "simulated": [
            {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
            for row in simulate(steps, options.batches, loads, options.requests)
        ],
    }
    table = as_markdown(results)
    name = options.name or slug(f"serving-simulation-{options.model}-{results['machine']['name']}")
    write_results(results, table, options.out, name)
    print(table)
    return 0


def counts(text: str) -> list[int]:
    """Whole numbers above 0 of a comma list, as argparse's `type`."""
    return [whole_number(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
