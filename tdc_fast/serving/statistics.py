"""What an engine has done: counts, sums and histograms, read by metrics and benches."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LATENCY_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of values by upper bound.

    Args:
        bounds: increasing upper bounds; one more count holds what is above them.

    Attributes:
        bounds: as given.
        total: the sum of all values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.total = bounds, 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """How many values are at most each bound, and last how many there are."""
        return list(itertools.accumulate(self._counts))


@dataclass
class Statistics:
    """Since the engine began. Hold `lock` while reading several that must agree.

    Attributes:
        num_experts: N; 1 without groups.
        outcomes: requests by how they ended: "completed", or the reason of a failure.
        images: images completed.
        steps: steps done.
        rows: places that were filled with images, or with the second half of guided ones, over all steps.
        padding: places that only filled a bucket.
        expert_rows: rows by expert, int64 (N,).
        failed_steps: steps that raised.
        forward_seconds: time in the denoiser, part of `step_seconds`. With CUDA graphs: in the launch of the graph.
        step_seconds: time of each step with everything around it.
        latency_seconds: time from submission to the end of completed requests.
        waiting_seconds: time until their first step.
    """

    num_experts: int
    outcomes: Counter[str] = field(default_factory=Counter)
    images: int = 0
    steps: int = 0
    rows: int = 0
    padding: int = 0
    failed_steps: int = 0
    forward_seconds: float = 0.0
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    latency_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_SECONDS))
    waiting_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_SECONDS))

    def __post_init__(self) -> None:
        self.expert_rows = np.zeros(self.num_experts, dtype=np.int64)
        self.lock = threading.Lock()
        self._weighted_seconds = self._weighted_rows = 0.0

    def count_step(self, expert_rows: np.ndarray, padding: int, seconds: float, forward_seconds: float) -> None:
        """Count a step; the lock is held.

        Args:
            expert_rows: the expert of every row, int64 (rows,).
            padding: its other places.
            seconds: what it took.
            forward_seconds: time in the denoiser in all steps.
        """
        rows = len(expert_rows)
        self.steps += 1
        self.rows += rows
        self.padding += padding
        self.expert_rows += np.bincount(expert_rows, minlength=self.num_experts)
        self.forward_seconds = forward_seconds
        self.step_seconds.add(seconds)
        self._weighted_seconds += rows * seconds
        self._weighted_rows += rows * rows

    @property
    def seconds_per_row(self) -> float:
        """Time of a row in full batches, about; 0 before the first step.

        The mean over rows of the time of their step, over that of its rows: steps of few rows, where a row takes
        longest, hardly count.
        """
        return self._weighted_seconds / self._weighted_rows if self._weighted_rows else 0.0
