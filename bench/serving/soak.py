"""`python -m bench.serving.soak`: mixed, cancelled and malformed requests for a long time, on loopback.

It starts `python -m tdc_fast.serve` on a small network with random weights (or a run), and ends with status 1 unless
every answer was an expected one, the server counted as many, nothing is stuck, resident memory and open files stayed
flat, and SIGTERM ended it with status 0.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.files import seconds
from tdc_fast.models.iddpm import create_unet

MODEL = {"image_size": 8, "num_channels": 8, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
FLAGS = [
    *(f"--{name}={value}" for name, value in MODEL.items()),
    *("--num_heads=1", "--in_channels=1", "--diffusion_steps=100", "--noise_schedule=cosine"),
]
LIMITS = ["--max_batch=8", "--max_queue=6", "--max_images=4", "--max_steps=60", "--max_body=2000", "--num_threads=1"]
DRAWN = {200, 503}
SECONDS_TO_FINISH = 30.0


class Soak:
    """The clients and what they saw.

    Args:
        address: of the server.
        rate: requests per second, of all clients together.
        clients: threads.

    Attributes:
        answers: answers by kind of request and status; 0 where the client left.
        wrong: answers that were not among the expected ones.
    """

    def __init__(self, address: tuple[str, int], rate: float, clients: int) -> None:
        self._address, self._pause, self._clients = address, clients / rate, clients
        self.answers: collections.Counter[tuple[str, int]] = collections.Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """Ask for so long; returns when all clients are done."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(number, end)) for number in range(self._clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def get(self, path: str) -> bytes:
        """The body of a GET."""
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by name and labels."""
        lines = self.get("/metrics").decode().splitlines()
        return {name: float(v) for name, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def _client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        kinds: list[Callable[[random.Random], None]] = [
            *[self._draw] * 6, *[self._watch] * 2, *[self._leave] * 2, self._expire, self._refused, self._malformed,
            self._half_a_body, self._garbage,
        ]  # fmt: skip
        turns: list[Callable[[random.Random], None]] = []
        while time.monotonic() < end:
            began = time.monotonic()
            turns = turns or draw.sample(kinds, len(kinds))  # every kind has its turn, also in a short time
            kind = turns.pop()
            try:
                kind(draw)
            except Exception as error:
                with self._lock:
                    self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            time.sleep(max(0.0, began + draw.uniform(0.5, 1.5) * self._pause - time.monotonic()))

    def _note(self, kind: str, status: int, expected: set[int], said: bytes = b"") -> None:
        with self._lock:
            self.answers[kind, status] += 1
            if status not in expected:
                self.wrong.append(f"{kind}: {status}: {said[:200]!r}")

    def _ask(self, body: bytes, method: str = "POST", path: str = "/generate") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            said = response.read()
            if response.status == 503 and int(response.headers["Retry-After"]) < 1:
                raise ValueError("503 without a time to come back")
            return response.status, said
        finally:
            connection.close()

    def _fields(self, draw: random.Random) -> dict[str, Any]:
        sampler, eta = draw.choice([("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpm++2m", 0.0)])
        return {
            "num_images": draw.randint(1, 4), "steps": draw.choice((5, 10, 25)), "sampler": sampler, "eta": eta,
            "format": draw.choice(("png", "npz", "json")),
        }  # fmt: skip

    def _draw(self, draw: random.Random) -> None:
        status, said = self._ask(json.dumps(self._fields(draw)).encode())
        if status == 200 and not said.startswith((b"\x89PNG", b"PK", b"{")):
            raise ValueError(f"not an image: {said[:40]!r}")
        self._note("draw", status, DRAWN, said)

    def _watch(self, draw: random.Random) -> None:
        fields = self._fields(draw) | {"format": "events", "preview_every": draw.randint(1, 5)}
        status, said = self._ask(json.dumps(fields).encode())
        if status == 200 and said.count(b"event: result") != 1:
            raise ValueError(f"events without a result: {said[-200:]!r}")
        self._note("watch", status, DRAWN, said)

    def _leave(self, draw: random.Random) -> None:
        fields = self._fields(draw) | {"steps": 60, "format": draw.choice(("png", "events"))}
        with self._connection(json.dumps(fields).encode()):
            time.sleep(draw.uniform(0, 0.1))
        self._note("leave", 0, {0})

    def _expire(self, draw: random.Random) -> None:
        fields = self._fields(draw) | {"steps": 60, "timeout": 0.001}
        status, said = self._ask(json.dumps(fields).encode())
        self._note("expire", status, {504, 503}, said)

    def _refused(self, draw: random.Random) -> None:
        wrong = draw.choice(
            [{"steps": 0}, {"steps": 61}, {"num_images": 5}, {"sampler": "x"}, {"eta": "no"}, {"label": 1}, {"a": 1}]
        )
        status, said = self._ask(json.dumps(wrong).encode())
        error = json.loads(said)["error"]
        if error["field"] not in error["message"] and error["field"] != "body":
            raise ValueError(f"a refusal that does not name its field: {said!r}")
        self._note("refused", status, {422}, said)

    def _malformed(self, draw: random.Random) -> None:
        body, expected = draw.choice([(b"{", 422), (b"\xff", 422), (b"[1]", 422), (b" " * 3000, 413)])
        status, said = self._ask(body)
        self._note("malformed", status, {expected}, said)
        status, said = self._ask(b"", *draw.choice([("GET", "/nothing"), ("DELETE", "/health")]))
        self._note("elsewhere", status, {404, 405}, said)

    def _half_a_body(self, draw: random.Random) -> None:
        with self._connection(b"{", length=50):
            time.sleep(draw.uniform(0, 0.05))
        self._note("half a body", 0, {0})

    def _garbage(self, draw: random.Random) -> None:
        with socket.create_connection(self._address, timeout=60) as connection, suppress(ConnectionError):
            connection.sendall(draw.randbytes(50) + b"\r\n\r\n")
            connection.recv(100)
        with self._lock:
            self.answers["garbage", 0] += 1

    def _connection(self, body: bytes, length: int | None = None) -> socket.socket:
        head = f"POST /generate HTTP/1.1\r\nHost: soak\r\nContent-Length: {length or len(body)}\r\n\r\n"
        connection = socket.create_connection(self._address, timeout=60)
        connection.sendall(head.encode() + body)
        return connection


def problems_of(soak: Soak, before: dict[str, float], growth: float, most_growth: float) -> list[str]:
    """What is wrong after a soak; empty if nothing is.

    Args:
        soak: it is over.
        before: the metrics after the first answers.
        growth: of resident memory, as a share.
        most_growth: the most that is flat.
    """
    found = soak.wrong[:20]
    deadline = time.monotonic() + SECONDS_TO_FINISH
    while (health := json.loads(soak.get("/health")))["waiting"] + health["running"]:
        if time.monotonic() > deadline:
            found.append(f"stuck: {health['waiting']} waiting, {health['running']} running")
            break
        time.sleep(0.1)
    sent = sum(n for (kind, _), n in soak.answers.items() if kind not in ("garbage", "elsewhere"))
    seen = collections.Counter[int]()
    while True:  # a departure is noticed a moment later
        metrics = soak.metrics()
        seen.clear()
        for name, value in metrics.items():
            if match := re.fullmatch(r'tdc_http_responses_total\{path="/generate",status="(\d+)"\}', name):
                seen[int(match[1])] += int(value)
        if seen.total() >= sent or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if seen.total() != sent:
        found.append(f"{sent} requests were sent, and the server answered {seen.total()}")
    read = collections.Counter[int]()
    for (kind, status), count in soak.answers.items():
        if kind not in ("garbage", "elsewhere"):
            read[status] += count
    for status in sorted(read.keys() - {0}):
        if read[status] > seen[status]:
            found.append(f"clients read {read[status]} answers of status {status}, the server counted {seen[status]}")
    if seen[500]:
        found.append(f"{seen[500]} answers of status 500")
    ended = sum(value for name, value in metrics.items() if name.startswith("tdc_requests_total"))
    without_engine = seen[422] + seen[413] + seen[408]
    half = soak.answers["half a body", 0]
    if ended != seen.total() - without_engine - half:
        found.append(f"{ended:.0f} requests ended in the engine, of {seen.total() - without_engine - half} handed over")
    if growth > most_growth:
        found.append(f"resident memory grew by {growth:.1%}")
    if metrics["process_open_fds"] > before["process_open_fds"] + 5:
        found.append(f"open files: {before['process_open_fds']:.0f}, now {metrics['process_open_fds']:.0f}")
    return found


def growth_of(resident: list[float]) -> float:
    """Growth of resident memory from the second fifth of its samples to the last, as a share; medians of both."""
    fifth = max(1, len(resident) // 5)
    return statistics.median(resident[-fifth:]) / statistics.median(resident[fifth : 2 * fifth] or resident) - 1


def main(argv: list[str] | None = None) -> int:
    """Soak a server; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving.soak", description=__doc__)
    parser.add_argument("--minutes", type=seconds, default=30.0, help="how long")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--clients", type=int, default=12, help="clients that ask at the same time")
    parser.add_argument("--run", default="", help="a run directory to serve, unconditional; empty for random weights")
    parser.add_argument("--most_growth", type=float, default=0.02, help="share by which resident memory may grow")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        source = ["--run", options.run] if options.run else ["--model_path", _weights(Path(folder)), *FLAGS]
        command = [sys.executable, "-m", "tdc_fast.serve", "--port=0", *LIMITS, *source]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                found, summary = _soak(process, options)
            finally:
                process.kill()
    print(json.dumps(summary, indent=1))
    for problem in found:
        print(f"wrong: {problem}")
    return 1 if found else 0


def _weights(folder: Path) -> str:
    torch.manual_seed(0)
    torch.save(create_unet(**MODEL, num_heads=1, in_channels=1).state_dict(), folder / "weights.pt")  # type: ignore[arg-type]
    return str(folder / "weights.pt")


def _soak(process: subprocess.Popen[str], options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    assert process.stdout is not None
    address = next((m for line in process.stdout if (m := re.search(r"on http://([\d.]+):(\d+)", line))), None)
    if address is None:
        return ["the server ended before it served"], {}
    soak = Soak((address[1], int(address[2])), options.rate, options.clients)
    soak.run(min(5.0, options.minutes * 6))  # the first answers bring every module and buffer in
    before, resident, is_over = soak.metrics(), list[float](), threading.Event()

    def watch() -> None:
        while not is_over.wait(min(2.0, options.minutes)):
            resident.append(soak.metrics()["process_resident_memory_bytes"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    soak.run(options.minutes * 60)
    is_over.set()
    watcher.join()
    growth = growth_of(resident)
    found = problems_of(soak, before, growth, options.most_growth)
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(SECONDS_TO_FINISH)
    except subprocess.TimeoutExpired:
        status = -1
    if status != 0:
        found.append(f"SIGTERM ended the server with status {status}")
    summary = {
        "minutes": options.minutes,
        "answers": {f"{kind}: {status or 'left'}": n for (kind, status), n in sorted(soak.answers.items())},
        "resident_mib": [round(value / 2**20, 1) for value in (resident[0], max(resident), resident[-1])],
        "growth": round(growth, 4),
        "last_words": process.stdout.read().strip(),
    }
    return found, summary


if __name__ == "__main__":
    sys.exit(main())
