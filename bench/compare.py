"""The one timing helper of all suites: candidates run interleaved, medians and their ratios are reported.

On a shared machine speed drifts by the second. Timing one candidate to the end and then the next would compare two
moments; here every round times each candidate once, so drift hits all of them alike and the ratio survives it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Candidate = Callable[[], Any]

WARMUP_ROUNDS = 3


def default_rounds() -> int:
    """Rounds per case; ``TDC_FAST_BENCH_ROUNDS`` overrides (1 for a smoke run)."""
    return int(os.environ.get("TDC_FAST_BENCH_ROUNDS", "30"))


def compare(benchmark, ours: Candidate, peers: Mapping[str, Candidate], *, rounds: int | None = None) -> None:
    """Benchmarks ``ours`` with the pytest-benchmark fixture and times every peer between its rounds.

    Leaves in ``benchmark.extra_info``: ``peers_ms`` (median per peer) and ``ratios`` (median of the per-round quotients
    ours / peer; below 1 is faster than the peer).
    """
    rounds = rounds or default_rounds()
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    own: list[float] = []

    def run_peers() -> None:
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - start)

    def timed_ours() -> None:
        start = time.perf_counter()
        ours()
        own.append(time.perf_counter() - start)

    benchmark.pedantic(timed_ours, setup=run_peers, rounds=rounds, warmup_rounds=min(WARMUP_ROUNDS, rounds))
    own, seconds = own[-rounds:], {name: values[-rounds:] for name, values in seconds.items()}
    benchmark.extra_info["ours_ms"] = 1e3 * statistics.median(own)
    benchmark.extra_info["peers_ms"] = {name: 1e3 * statistics.median(v) for name, v in seconds.items()}
    benchmark.extra_info["ratios"] = {
        name: statistics.median(a / b for a, b in zip(own, v, strict=True)) for name, v in seconds.items()
    }
