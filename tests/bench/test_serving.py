"""The benches of serving in miniature: every contestant serves, and a soak finds nothing wrong, and what is wrong."""

from __future__ import annotations

import collections
import importlib.util
import json

import pytest
import torch

from bench.serving.__main__ import main
from bench.serving.contestants import Problem
from bench.serving.soak import growth_of, problems_of
from bench.serving.soak import main as soak
from tdc_fast.serving import Request

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


def test_the_measurement_runs_and_writes_its_tables_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.serving.loads.STEPS", (1, 2, 3))
    flags = ["--seconds", "0.5", "--loads", "0.8", "--max_batch", "4", "--out", str(tmp_path), "--name", "s"]
    flags += ["--overhead_steps", "10"]
    assert main([*flags, "--picture", str(tmp_path / "s.svg")]) == 0
    results = json.loads((tmp_path / "s.json").read_text())
    assert set(results["closed"]) == {"engine", "request level", "expert by expert", "dense"}
    assert [row["contestant"] for row in results["open"]] == ["engine", "request level", "dense"]
    assert 0 < results["overhead"]["ddim"] < 1
    table = (tmp_path / "s.md").read_text()
    assert "p99 at 80 % load" in table and "| 80% | engine |" in table
    assert "<svg" in (tmp_path / "s.svg").read_text()


@needs_server
def test_a_soak_of_twenty_seconds_finds_nothing_wrong(capfd):
    """`python -m bench.serving.soak --minutes 1`, or 30, is the longer form."""
    status = soak(["--minutes", "0.33", "--rate", "8"])
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
