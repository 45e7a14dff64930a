"""torchrun itself: a process that is killed, the restart that goes on from the last checkpoint, and SIGTERM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdc_fast.runs.checkpoint import find_problem, finished_steps
from tests.distributed.launcher import Launcher, end, torchrun, train_command
from tests.training.small_run import flags, rows, small_config


def test_killed_started_again_and_stopped_a_run_goes_on_in_one_process(tmp_path):
    launcher = Launcher()
    config = small_config(tmp_path, lr_anneal_steps=40, save_interval=10, log_interval=20)
    run, output = Path(config.run_dir), tmp_path / "output.txt"
    command = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "-m", "tdc_fast.train", *flags(config)]
    agent = launcher.start(1, torchrun, command, str(output), output=tmp_path / "torchrun.txt")
    end(agent, 240)
    said, of_torchrun = output.read_text(), (tmp_path / "torchrun.0").read_text()
    assert "Process" in of_torchrun and "got signal: 15" in of_torchrun, of_torchrun
    assert "resumed at step 10\n" in (run / "log.txt").read_text() and find_problem(run, 10, {}) is None
    step = finished_steps(run)[-1]
    assert 25 < step <= 30
    assert f"stopped after step {step} of stage base, which is saved; continue with: " in said
    assert "another process of the run has ended" in said and said.count(f"run directory: {run}") == 2

    one = flags(config.replace(run_dir=str(tmp_path / "one")))
    for argv in (["--resume", str(run)], one):
        launcher.run(1, train_command, argv, output=tmp_path / "alone.txt")
    assert finished_steps(run)[-1] == 40
    for several, one in zip(*(rows(path / "progress.csv") for path in (run, tmp_path / "one")), strict=True):
        values = {name: float(value or 0) for name, value in one.items()}
        assert {name: float(value or 0) for name, value in several.items()} == pytest.approx(values, rel=1e-3)
