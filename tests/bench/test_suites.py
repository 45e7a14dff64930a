"""The throughput suites run, and report what they measured (how fast is not a matter for tests)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bench.compare import compare
from bench.files import ROOT


class OneRound:
    """Stands in for the pytest-benchmark fixture."""

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()


def test_candidates_take_turns_and_warm_up_rounds_do_not_count():
    calls: list[str] = []
    benchmark = OneRound()
    peers = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    compare(benchmark, lambda: calls.append("ours"), peers, rounds=2)
    assert calls == ["a", "b", "ours", "b", "a", "ours"] * 2  # nobody always finds the same caches
    assert benchmark.extra_info["peers_ms"].keys() == benchmark.extra_info["ratios"].keys() == {"a", "b"}


def test_the_suites_write_their_results(tmp_path):
    wanted = {"conv2d": "C32-8x8", "group_norm": "64x32x8x8", "unet": "8x8 and forward"}
    only = " or ".join(f"({suite} and {case})" for suite, case in wanted.items())
    command = [sys.executable, "-m", "bench", "--out", str(tmp_path), "--name", "here", "--only", only]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**ours, "TDC_FAST_BENCH_ROUNDS": "1", "OMP_NUM_THREADS": "1"}  # beside xdist nothing is timed
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    results = json.loads((tmp_path / "here.json").read_text())
    assert results["command"].endswith(f"python -m bench --only '{only}'")
    assert {row["suite"] for row in results["rows"]} == set(wanted)
    assert all(row["ours_ms"] > 0 and row["ratios"] for row in results["rows"])
    table = (tmp_path / "here.md").read_text()
    assert all(f"| {row['case']} |" in table for row in results["rows"])
