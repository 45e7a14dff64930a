"""Jobs in worker processes: results, errors and interrupts."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tdc_fast.experiments import jobs
from tdc_fast.experiments.contestants import contestants
from tdc_fast.training.interrupts import TrainingInterrupted


def test_the_worker_pool_runs_jobs_and_raises_their_errors(tmp_path):
    said: list[str] = []
    good = jobs.Job("good", Path.write_text, (tmp_path / "f", "done"))
    assert jobs.run_jobs([good], 1, said.append).keys() == {"good"}
    assert (tmp_path / "f").read_text() == "done"
    assert said[0].startswith("good: done in")
    bad = jobs.Job("bad", Path.read_text, (tmp_path / "missing",))
    with pytest.raises(FileNotFoundError):
        jobs.run_jobs([bad], 1, said.append)
    assert any(line.startswith("bad: ") and "missing" in line for line in said)


def test_progress_says_what_follows_training_where_something_does(tmp_path):
    progress = tmp_path / "progress.csv"
    progress.write_text("step,loss\n8,0.5\n")
    trained = jobs.Job("stage 1", print, (), progress, 8)
    assert jobs._progress_line(trained, {}) == "stage 1: trained"
    measured = jobs.contest_job(contestants(tmp_path, 10, 0, control=False)[0], progress, None, progress)
    measured = replace(measured, progress=progress, steps=8)
    assert jobs._progress_line(measured, {}) == "uniform, C: trained, now drawing and comparing samples"


def test_an_error_ends_the_experiment_before_another_job_begins(tmp_path):
    never = tmp_path / "never"
    queue = [jobs.Job("bad", Path.read_text, (tmp_path / "missing",)), jobs.Job("next", Path.touch, (never,))]
    with pytest.raises(FileNotFoundError):
        jobs.run_jobs(queue, 1, print)
    assert not never.exists()


def test_an_interrupted_run_leaves_it_to_the_experiment_to_say_how_to_continue(tmp_path, monkeypatch):
    def stop(config):
        raise TrainingInterrupted(f"continue with: --resume {config.run_dir}")

    monkeypatch.setattr(jobs, "train", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        jobs.train_contestant(contestants(tmp_path, 10, 0, control=False)[0])
    assert str(stopped.value) == ""


def test_a_worker_that_still_imports_ends_at_ctrl_c_without_beginning_its_job(tmp_path):
    """It starts with the signal blocked, and takes it where the job would begin."""
    begun: list[set[int]] = []

    class Pool:
        def submit(self, function, job):
            begun.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    handler, mask = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    job = jobs.Job("never", Path.touch, (tmp_path / "never",))
    jobs._submit(Pool(), job)
    assert signal.SIGINT in begun[0] and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            jobs._in_worker(job)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert not (tmp_path / "never").exists()
