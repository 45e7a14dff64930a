"""The job's tasks, run side by side in worker processes of one thread each.

A task's numbers depend on its arguments alone, so it does not matter how many run at once or in which order.
"""

from __future__ import annotations

import contextlib
import csv
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tdc_fast.experiments.contestants import Contestant
from tdc_fast.experiments.measure import Protocol, measure
from tdc_fast.train import train

REPORT_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class Task:
    """A function to call in a worker, and where its training progress can be read (None: it shows none)."""

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    progress: Path | None = None
    steps: int = 0


def train_contestant(contestant: Contestant) -> None:
    """Train a run, or what is left of it."""
    with contextlib.redirect_stdout(io.StringIO()):  # the job speaks for all its runs, a line at a time
        train(contestant.config.replace(resume=contestant.config.run_dir))


def train_and_measure(contestant: Contestant, yardsticks: Path, protocol: Protocol, measured: Path) -> None:
    """Train a contestant, then measure it; what an earlier attempt has finished is kept."""
    train_contestant(contestant)
    if not measured.exists():
        measure(contestant.directory, yardsticks, protocol, measured)


def run_tasks(tasks: Sequence[Task], processes: int, say: Callable[[str], None]) -> dict[str, float]:
    """Run all tasks, at most `processes` at once, in the order given; seconds of each by name.

    `processes` 0 runs them in this process, one after another. The first error ends the job and is raised.
    """
    if processes == 0 or not tasks:
        return {task.name: _timed(task) for task in tasks}
    context = multiprocessing.get_context("spawn")
    workers = min(processes, len(tasks))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    seconds: dict[str, float] = {}
    shown: dict[str, int] = {}
    waiting = list(tasks)
    pending: dict[Future[float], Task] = {}
    try:
        while pending or waiting:
            # Never more than the workers can begin: a task that is queued could not be called back after Ctrl-C.
            while waiting and len(pending) < workers:
                task = waiting.pop(0)
                pending[pool.submit(_in_worker, task)] = task
            done, _ = wait(pending, timeout=REPORT_EVERY_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                task = pending.pop(future)
                try:
                    seconds[task.name] = future.result()
                except Exception as error:
                    say(f"{task.name}: {error}")
                    raise
                say(f"{task.name}: done in {seconds[task.name]:.0f} s")
            for task in pending.values():
                line = _progress_line(task, shown)
                if line:
                    say(line)
    except BaseException as error:
        say(f"{type(error).__name__}: the job ends as soon as the tasks now running have saved or finished")
        raise
    finally:
        # Workers that still train get Ctrl-C with this process and save before they end.
        pool.shutdown(wait=True)
    return seconds


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker that waits has nothing to save
    torch.set_num_threads(1)
    os.environ["OPENAI_LOG_FORMAT"] = "csv,log"


def _in_worker(task: Task) -> float:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _timed(task)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _timed(task: Task) -> float:
    start = time.perf_counter()
    task.call(*task.arguments)
    return time.perf_counter() - start


def _progress_line(task: Task, shown: dict[str, int]) -> str:
    """Where the task's training is, if it has moved since the last time."""
    if task.progress is None or not task.progress.is_file():
        return ""
    rows = read_progress(task.progress)
    if not rows:
        return ""
    step = int(rows[-1]["step"])
    if shown.get(task.name) == step:
        return ""
    shown[task.name] = step
    if step == task.steps:
        return f"{task.name}: trained, now drawing and comparing samples"
    of = f" of {task.steps}" if task.steps else ""
    return f"{task.name}: step {step}{of}, loss {float(rows[-1]['loss']):.4f}"


def read_progress(path: Path) -> list[dict[str, str]]:
    """The rows of a progress.csv; a last row that is still being written is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))
