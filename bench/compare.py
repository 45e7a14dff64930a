"""The timing helper of the CPU suites: candidates run interleaved; medians and ratios are reported.

The speed of a shared machine changes from second to second, so candidates timed one after the other are not
comparable. Here every round times each candidate once: changes of speed affect all equally and cancel in ratios.

What ran before decides what is left in the caches and in the heap: a convolution of a third of a millisecond takes half
as long again after a candidate that touches much memory. So the order of the peers goes through all their permutations:
every candidate follows every other one equally often.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Candidate = Callable[[], Any]

WARMUP_ROUNDS = 3


def default_rounds() -> int:
    """Rounds per case: `TDC_FAST_BENCH_ROUNDS` (1 for a smoke run), else 30."""
    return int(os.environ.get("TDC_FAST_BENCH_ROUNDS", "30"))


def compare(benchmark, ours: Candidate, peers: Mapping[str, Candidate], *, rounds: int | None = None) -> None:
    """Benchmark `ours` with the pytest-benchmark fixture and time every peer between its rounds.

    It sets in `benchmark.extra_info`: `ours_ms`, `peers_ms` (median per peer) and `ratios` (median over rounds of
    ours / peer; below 1 is faster than the peer).

    Args:
        benchmark: the fixture.
        ours: what is benchmarked.
        peers: what it is compared with, by name.
        rounds: number of rounds; None for `default_rounds()`.
    """
    rounds = rounds or default_rounds()
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    own: list[float] = []
    orders = itertools.cycle(itertools.permutations(peers))

    def run_peers() -> None:
        for name in next(orders):
            peer = peers[name]
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
