"""The benches of serving in miniature: every contestant serves, and a soak finds nothing wrong, and what is wrong."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import time
from concurrent.futures import Future

import pytest
import torch

from bench.serving import simulation
from bench.serving.__main__ import main, measure
from bench.serving.contestants import Problem
from bench.serving.loads import Measured, open_loop
from bench.serving.report import README, as_markdown, capacity_of, goals, publish
from bench.serving.simulation import POLICIES, Arrivals, interpolated, simulate_engine, simulate_request_level
from bench.serving.soak import growth_of, problems_of
from bench.serving.soak import main as soak
from tdc_fast.serving import Engine, Policy, Request, Result
from tests.serving.models import SHAPE, Scripted, process

needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("fastapi", "uvicorn", "prometheus_client")),
    reason="no fastapi, uvicorn or prometheus_client: pip install tdc_fast[serve]",
)


def test_every_contestant_draws_the_images_of_its_model():
    problem = Problem("digits", 8, torch.device("cpu"), torch.float32)
    drawn = {}
    for name, make in problem.contestants(4).items():
        server = make()
        server.start()
        handles = [server.submit(Request(seed=seed, steps=steps)) for seed, steps in ((1, 10), (2, 4), (3, 10))]
        drawn[name] = torch.cat([handle.result(60).samples for handle in handles])
        server.close()
    for name in ("request level", "expert by expert"):
        torch.testing.assert_close(drawn[name], drawn["engine"], rtol=0, atol=1e-4)
    assert drawn["dense"].shape == (3, 1, 8, 8)


def test_the_measurement_runs_and_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.serving.loads.STEPS", (1, 2, 3))
    flags = ["--seconds", "0.4", "--loads", "0.8", "--max_batch", "4", "--repeats", "2", "--overhead_steps", "10"]
    assert main([*flags, "--out", str(tmp_path), "--name", "s"]) == 0
    results = json.loads((tmp_path / "s.json").read_text())
    order = [row["contestant"] for row in results["closed"]]
    assert order == ["engine", "request level", "expert by expert", "dense"] + order[3::-1]
    order = [row["contestant"] for row in results["open"]]
    assert order == ["engine", "request level", "dense"] + order[2::-1]
    assert 0 < results["overhead"]["ddim"] < 1 and results["settings"]["repeats"] == 2
    assert all(row["others"] is None or -1 < row["others"] < os.cpu_count() + 1 for row in results["open"])
    table = (tmp_path / "s.md").read_text()
    assert "p99 at 80 % load" in table and "| 80% | engine |" in table


@pytest.mark.parametrize(
    "flags",
    [("--repeats", "0"), ("--seconds", "nan"), ("--max_batch", "-1"), ("--loads", "0.8,x"), ("--loads", "0.8,0")],
)
def test_what_cannot_be_measured_is_refused_by_the_name_of_its_flag(flags, capsys):
    with pytest.raises(SystemExit):
        main([*flags])
    assert f"error: {flags[0]} takes" in capsys.readouterr().err


def test_a_measurement_in_which_nothing_was_completed_says_so(monkeypatch):
    class Idle:
        def contestants(self, max_batch: int) -> dict[str, type[Idle]]:
            return {"engine": Idle, "request level": Idle}

        def start(self) -> None: ...

        def close(self, *, drain: bool) -> None: ...

    nothing = Measured(0.0, 0.0, float("nan"), float("nan"), requests=0, unfinished=0)
    monkeypatch.setattr("bench.serving.__main__.closed_loop", lambda *_: nothing)
    with pytest.raises(SystemExit, match="no image was completed in the closed loops; --seconds"):
        measure(Idle(), 4, [0.8], 1.0, 1)  # type: ignore[arg-type]


def measured(contestant: str, repeat: int, p99: float, load: float | None = None) -> dict[str, object]:
    row = {"contestant": contestant, "repeat": repeat, "images_per_second": 10.0 * (repeat + 1), "p50": p99 / 2}
    row["others"] = 0.75 if load and contestant == "dense" and repeat == 2 else 0.02
    return row | {"p99": p99, "requests": 100, "unfinished": repeat} | ({} if load is None else {"load": load})


MEASUREMENT = {
    "date": "2026-01-01", "command": "x", "minutes": 1, "note": "", "machine": {"name": "CPU", "threads": 1},
    "versions": {"torch": "2", "python": "3"},
    "settings": {"model": "digits", "experts": 8, "max_batch": 32, "dtype": "float32", "repeats": 3},
    "overhead": {"ddim": 0.03}, "clients": 64, "capacity": 20.0,
    "closed": [measured(n, r, 1.0) for n in ("engine", "request level", "expert by expert", "dense") for r in range(3)],
    "open": [
        measured(name, repeat, p99, 0.8)
        for name, values in {"engine": (0.3, 0.2, 0.9), "request level": (0.6, 0.5, 1.0), "dense": (1, 1, 1)}.items()
        for repeat, p99 in enumerate(values)
    ],
}  # fmt: skip


def test_a_report_has_medians_of_the_repeats_and_ratios_of_what_was_measured_together(tmp_path):
    assert capacity_of(MEASUREMENT["closed"]) == 20.0
    assert dict(goals(MEASUREMENT))["p99 at 80 % load at most 0.5x that of request-level batches"] == (
        "0.50x (0.40 to 0.90)"
    )
    table = as_markdown(MEASUREMENT)
    assert "| 80% | request level | 20.0 | 300 | 600 | 300 | 3 |" in table
    assert "measured 3 times" in table and "used 0.02 processors (0.75 in the worst run)" in table
    once = MEASUREMENT | {"settings": MEASUREMENT["settings"] | {"repeats": 1}, "closed": [], "open": []}
    once |= {"closed": [row for row in MEASUREMENT["closed"] if not row["repeat"]]}
    once["closed"] = [{name: row[name] for name in row if name != "others"} for row in once["closed"]]
    assert "measured once" in as_markdown(once) and "processors" not in as_markdown(once)
    readme, picture = tmp_path / "README.md", tmp_path / "docs" / "serving.svg"
    for _ in range(2):  # the second time replaces what the first one wrote
        readme.write_text("before\n<!-- measured: serving -->\nold\n<!-- end -->\nafter\n")
        publish(MEASUREMENT, tmp_path / "results" / "s.md", picture=picture, readme=readme)
    said = readme.read_text()
    assert said.startswith("before\n<!-- measured: serving -->\nOn one thread") and said.endswith(
        "<!-- end -->\nafter\n"
    )
    assert "within 300 ms at 80 % load" in said and "took 600 ms" in said and "(results/s.md)" in said
    assert "old" not in said and "<svg" in picture.read_text()
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="<!-- measured: serving -->"):
        publish(MEASUREMENT, tmp_path / "s.md", picture=picture, readme=readme)


def test_the_readme_has_the_marks():
    text = README.read_text()
    assert text.count("<!-- measured: serving -->") == text.count("<!-- end -->") == 1


def test_latencies_count_from_when_a_request_was_due():
    """A server that takes long to take a request makes the load late; that is part of what its clients wait."""

    class Slow:
        def submit(self, request: Request) -> Future[Result]:
            time.sleep(0.05)
            future: Future[Result] = Future()
            future.set_result(Result(torch.zeros(1), None, 0.0, 0.01))
            return future

    seen = open_loop(Slow(), rate=40, seconds=0.5)  # type: ignore[arg-type]
    assert seen.p99 > 0.1 and seen.unfinished == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulated_engine_takes_the_steps_of_the_real_one(policy):
    requests = [Request(seed=number, steps=steps) for number, steps in enumerate([10, 40, 25, 10, 25, 40, 10])]
    model = Scripted()
    engine = Engine(model, process(), SHAPE, max_batch=3, policy=Policy(policy), deterministic=False)
    for request in requests:
        engine.submit(request)
    with engine:
        pass
    rows: list[int] = []
    arrivals = Arrivals([(0.0, request) for request in requests])
    end = simulate_engine(arrivals, lambda count: rows.append(count) or 1.0, Policy(policy), 3)  # type: ignore[func-returns-value]
    assert rows == model.calls and end == len(rows) and sum(rows) == sum(request.steps for request in requests)


def test_simulated_times_are_those_of_the_steps():
    """One request alone, then two that meet: the second comes while the first is in its third step of ten."""
    requests = [(0.0, Request(steps=25)), (100.0, Request(steps=10)), (102.5, Request(steps=10))]
    alone = Arrivals(requests)
    assert simulate_engine(alone, lambda rows: 1.0 + rows, Policy(), 4) == 100.0 + 2 * 2.0 + 8 * 3.0 + 2 * 2.0
    assert alone.seconds == [50.0, 28.0, 29.5]
    whole = Arrivals(requests)
    assert simulate_request_level(whole, lambda rows: 1.0 + rows, 4) == 140.0
    assert whole.seconds == [50.0, 20.0, 37.5]
    closed = Arrivals(requests, clients=1)
    assert simulate_engine(closed, lambda rows: 1.0, Policy(), 4) == 45.0 and closed.seconds == [25.0, 10.0, 10.0]
    table = interpolated([[1, 2.0], [3, 4.0], [4, 7.0]])
    assert [table(rows) for rows in (1, 2, 4, 6)] == [2.0, 3.0, 7.0, 13.0]


def test_at_80_percent_load_the_longest_times_are_half_of_those_of_whole_requests():
    """Simulated with steps of 5 ms and 0.08 ms for each place, about those of the demo's network: nothing is timed."""
    steps = {"engine": [[1, 0.00508], [2, 0.00516]], "request level": [[1, 0.00508], [2, 0.00516]]}
    rows = simulation.simulate(steps, [Engine.__init__.__kwdefaults__["max_batch"]], [0.8], 3000)
    ratio = {row["contestant"]: row["ratio"] for row in rows}
    assert ratio[f"engine, {Policy().name}"] < 0.5
    assert ratio["engine, slack"] < ratio["engine, fifo"] < ratio["engine, shortest"] < 0.6


def test_the_simulation_runs_and_says_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.serving.simulation.ROWS", (1, 2))
    flags = ["--batches", "4", "--loads", "0.8", "--requests", "200", "--repeats", "1", "--experts", "2"]
    assert simulation.main([*flags, "--out", str(tmp_path), "--name", "s"]) == 0
    results = json.loads((tmp_path / "s.json").read_text())
    assert [row["contestant"] for row in results["simulated"]] == [
        "request level", "engine, slack", "engine, fifo", "engine, shortest",
    ]  # fmt: skip
    assert all(0 < row["p50"] < row["p99"] for row in results["simulated"])
    table = (tmp_path / "s.md").read_text()
    assert "a simulation" in table and "## Measured" in table and "## Simulated" in table


@needs_server
def test_a_soak_of_seconds_loses_no_answer(capfd):
    """CI runs `python -m bench.serving.soak --minutes 1`, where memory has to stay flat too."""
    status = soak(["--minutes", "0.1", "--rate", "25", "--most_growth", "0.2"])
    said = capfd.readouterr().out
    assert status == 0, said
    answers = json.loads(said)["answers"]
    assert answers["draw: 200"] > 10 and answers["leave: left"] > 0 and answers["half a body: left"] > 0
    assert {"expire: 504", "refused: 422", "watch: 200"} <= answers.keys()


class Finished:
    """A soak that is over, with what clients and server counted."""

    def __init__(self, **server: float) -> None:
        self.answers = collections.Counter({("draw", 200): 8, ("refused", 422): 2, ("leave", 0): 1})
        self.wrong: list[str] = []
        self.server = {"process_open_fds": 9.0, 'tdc_requests_total{outcome="completed"}': 9.0} | server
        for status, count in ((200, 8.0), (422, 2.0), (499, 1.0)):
            self.server.setdefault(f'tdc_http_responses_total{{path="/generate",status="{status}"}}', count)

    def get(self, path: str) -> bytes:
        return b'{"waiting": 0, "running": 0}'

    def metrics(self) -> dict[str, float]:
        return self.server


def test_a_soak_names_what_does_not_add_up(monkeypatch):
    monkeypatch.setattr("bench.serving.soak.SECONDS_TO_FINISH", 0.2)

    def problems(growth: float = 0.0, **server: float) -> list[str]:
        return problems_of(Finished(**server), {"process_open_fds": 9.0}, growth, 0.02)  # type: ignore[arg-type]

    assert problems() == []
    assert problems(growth=0.03) == ["resident memory grew by 3.0%"]
    assert "open files: 9, now 20" in problems(process_open_fds=20.0)
    ok = 'tdc_http_responses_total{path="/generate",status="200"}'
    assert "11 requests were sent, and the server answered 10" in problems(**{ok: 7.0})
    failed = 'tdc_http_responses_total{path="/generate",status="500"}'
    assert "1 answers of status 500" in problems(**{failed: 1.0, ok: 7.0})
    lost = {'tdc_requests_total{outcome="completed"}': 8.0}
    assert problems(**lost) == ["8 requests ended in the engine, of 9 handed over"]
    assert growth_of([90.0, 90.0, 100.0, 100.0, 100.0, 100.0, 101.0, 102.0, 103.0, 103.0]) == pytest.approx(0.03)
