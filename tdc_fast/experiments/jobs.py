"""Jobs of an experiment, run side by side in worker processes of one thread each.

A job's numbers depend on its arguments alone, so it does not matter how many run at once or in which order.
"""

from __future__ import annotations

import contextlib
import csv
import gc
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
from tdc_fast.experiments.measure import MeasuringProtocol, measure
from tdc_fast.training.interrupts import TrainingInterrupted
from tdc_fast.training.train import train

REPORT_EVERY_SECONDS = 15.0
MEASURING = "drawing and comparing samples"


@dataclass(frozen=True)
class Job:
    """A function to call in a worker process.

    Attributes:
        name: names the job in progress lines and in the seconds taken.
        call: the function; it and its arguments must be picklable.
        arguments: what to call it with.
        progress: the progress.csv of its training, from which its progress is reported; None reports none.
        steps: the step at which that training ends; 0 where it is not known.
        then: what follows that training in the job, for its progress.
    """

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    progress: Path | None = None
    steps: int = 0
    then: str = ""


def train_contestant(contestant: Contestant) -> None:
    """Train a run, or what is left of it.

    Raises:
        KeyboardInterrupt: after Ctrl-C, without a message: the experiment's command continues its runs, not the
            command that the run's own message names.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the experiment reports on its runs, a line at a time
            train(contestant.config.replace(resume=contestant.config.run_dir))
    except TrainingInterrupted as interrupted:
        raise KeyboardInterrupt from interrupted


def train_and_measure(contestant: Contestant, reference: Path, protocol: MeasuringProtocol, measured: Path) -> None:
    """Train a contestant, then measure it; what an earlier attempt has finished is kept."""
    train_contestant(contestant)
    if not measured.exists():
        measure(contestant.directory, reference, protocol, measured)


def training_job(contestant: Contestant) -> Job:
    """The job that trains a contestant."""
    arguments = (contestant,)
    return Job(contestant.label, train_contestant, arguments, contestant.progress, contestant.last_step)


def contest_job(contestant: Contestant, reference: Path, protocol: MeasuringProtocol, measured: Path) -> Job:
    """The job that trains and measures a contestant; arguments as for `train_and_measure`."""
    arguments = (contestant, reference, protocol, measured)
    return Job(contestant.label, train_and_measure, arguments, contestant.progress, contestant.last_step, MEASURING)


def run_jobs(jobs: Sequence[Job], processes: int, say: Callable[[str], None]) -> dict[str, float]:
    """Run all jobs in the order given and return the seconds that each took, by name.

    The first error ends the experiment and is raised.

    Args:
        jobs: what to run.
        processes: how many may run at once; 0 runs them in this process, one after another.
        say: prints a line of progress.
    """
    if processes == 0 or not jobs:
        return {job.name: _timed(job) for job in jobs}
    context = multiprocessing.get_context("spawn")
    workers = min(processes, len(jobs))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    seconds: dict[str, float] = {}
    shown: dict[str, int] = {}
    waiting = list(jobs)
    pending: dict[Future[float], Job] = {}
    try:
        while pending or waiting:
            # Submit no more than the workers can start: a queued job could not be cancelled after Ctrl-C.
            while waiting and len(pending) < workers:
                job = waiting.pop(0)
                pending[_submit(pool, job)] = job
            done, _ = wait(pending, timeout=REPORT_EVERY_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                job = pending.pop(future)
                try:
                    seconds[job.name] = future.result()
                except Exception as error:
                    say(f"{job.name}: {error}")
                    raise
                say(f"{job.name}: done in {seconds[job.name]:.0f} s")
            for job in pending.values():
                line = _progress_line(job, shown)
                if line:
                    say(line)
    except BaseException as error:
        say(f"{type(error).__name__}: the experiment ends as soon as the running jobs have saved or finished")
        raise
    finally:
        # Workers that still train get Ctrl-C with this process and save before they end.
        pool.shutdown(wait=True)
    return seconds


def _submit(pool: ProcessPoolExecutor, job: Job) -> Future[float]:
    """Hand a job to the pool. A worker that this starts has Ctrl-C wait until its imports, of seconds, are done."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(_in_worker, job)
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which lets signals through again where it has to start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        return pool.submit(_in_worker, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.environ["OPENAI_LOG_FORMAT"] = "csv,log"


def _in_worker(job: Job) -> float:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # raises what came before the job began
        return _timed(job)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an idle worker has nothing to save


def _timed(job: Job) -> float:
    start = time.perf_counter()
    try:
        job.call(*job.arguments)
    finally:
        gc.collect()  # graphs and their memory pools, which the next job needs
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return time.perf_counter() - start


def _progress_line(job: Job, shown: dict[str, int]) -> str:
    """Where the job's training is, if it has moved since the last time."""
    if job.progress is None or not job.progress.is_file():
        return ""
    rows = read_progress(job.progress)
    if not rows:
        return ""
    step = int(rows[-1]["step"])
    if shown.get(job.name) == step:
        return ""
    shown[job.name] = step
    if step == job.steps:
        return f"{job.name}: trained{', now ' if job.then else ''}{job.then}"
    of = f" of {job.steps}" if job.steps else ""
    return f"{job.name}: step {step}{of}, loss {float(rows[-1]['loss']):.4f}"


def read_progress(path: Path) -> list[dict[str, str]]:
    """The rows of a progress.csv; a last row that is still being written is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))
