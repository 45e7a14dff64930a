"""Loads: an open loop, where requests come at random times whatever the server does, and a closed loop of clients."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.serving.contestants import Contestant, Handle
from tdc_fast.serving import Request, RequestFailed

STEPS = (10, 25, 50)
"""Sampling steps of requests, each as likely as the others."""


@dataclass(frozen=True)
class Measured:
    """What a contestant did under a load.

    Attributes:
        offered: requests per second that came; 0 in a closed loop.
        images_per_second: images completed per second of the measured time.
        p50: seconds, the median of the latencies of requests that came in the measured time.
        p99: likewise, the 99th percentile.
        requests: how many those are.
        unfinished: how many of them were not done when the time was over three times.
    """

    offered: float
    images_per_second: float
    p50: float
    p99: float
    requests: int
    unfinished: int

    def to_json(self) -> dict[str, Any]:
        """The numbers, rounded."""
        return {name: round(value, 5) for name, value in vars(self).items()}


def random_request(draw: random.Random) -> Request:
    """One image by DDIM in one of `STEPS`."""
    return Request(seed=draw.randrange(2**31), steps=draw.choice(STEPS))


def open_loop(server: Contestant, rate: float, seconds: float, seed: int = 0) -> Measured:
    """Requests come as a Poisson process; the first fifth of the time warms up and is not counted.

    Latencies are counted from when a request was due: where the load itself is late, because the server has the
    processor, that is part of them.

    Args:
        server: takes the requests; it has been started.
        rate: requests per second.
        seconds: how long they come.
        seed: of times and requests, so that all contestants get the same.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    counted_from, due = began + seconds / 5, began
    taken: list[tuple[float, float, Handle]] = []
    while True:
        due += draw.expovariate(rate)
        if due > began + seconds:
            break
        time.sleep(max(0.0, due - time.monotonic()))
        submitted = time.monotonic()
        taken.append((due, submitted, server.submit(random_request(draw))))
    end = began + seconds
    latencies, completed, unfinished = [], 0, 0
    for due, submitted, handle in taken:
        try:
            took = submitted - due + handle.result(max(0.0, began + 3 * seconds - time.monotonic())).took
        except (TimeoutError, RequestFailed, CancelledError):
            took = float("inf")
        completed += counted_from <= due + took <= end
        if due >= counted_from:
            latencies.append(took)
            unfinished += took == float("inf")
    measured = end - counted_from
    return Measured(
        rate, completed / measured, *_percentiles(latencies), requests=len(latencies), unfinished=unfinished
    )


def closed_loop(server: Contestant, clients: int, seconds: float, seed: int = 0) -> Measured:
    """So many clients, each of whom asks again as soon as it has its image; the first fifth is not counted."""
    began = time.monotonic()
    counted_from, end = began + seconds / 5, began + seconds
    done: list[tuple[float, float]] = []  # submitted, took

    def client(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            submitted = time.monotonic()
            done.append((submitted, server.submit(random_request(draw)).result().took))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    completed = sum(counted_from <= submitted + took <= end for submitted, took in done)
    latencies = [took for submitted, took in done if submitted >= counted_from]
    rate = completed / (end - counted_from)
    return Measured(0.0, rate, *_percentiles(latencies), requests=len(latencies), unfinished=0)


def _percentiles(latencies: list[float]) -> tuple[float, float]:
    if not latencies:
        return float("nan"), float("nan")
    p50, p99 = np.percentile(latencies, (50, 99), method="higher")
    return float(p50), float(p99)
