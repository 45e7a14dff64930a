"""torchrun itself: a process that is killed, the restart that goes on from the last checkpoint, and SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdc_fast.runs.checkpoint import find_problem, finished_steps
from tdc_fast.train import train
from tests.training.small_run import flags, rows, small_config

CHECKOUT = Path(__file__).parents[2]


def processes_of(agent: int) -> dict[str, int]:
    """The process of each rank that torchrun has started."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found.update({v.removeprefix("RANK="): int(child) for v in variables if v.startswith("RANK=")})
    return found


def wait_for(condition, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_killed_started_again_and_stopped_a_run_goes_on_in_one_process(tmp_path):
    config = small_config(tmp_path, lr_anneal_steps=150, save_interval=10, log_interval=50)
    run, output = Path(config.run_dir), tmp_path / "output.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    path = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    with open(output, "wb") as file:
        agent = subprocess.Popen(
            [*command, "-m", "tdc_fast.train", *flags(config)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        wait_for(lambda: finished_steps(run), agent)
        os.kill(processes_of(agent.pid)["1"], signal.SIGKILL)
        log = run / "log.txt"
        wait_for(lambda: "resumed at step" in log.read_text(), agent)
        resumed = int(log.read_text().split("resumed at step ")[1].split()[0])
        assert resumed in finished_steps(run) and find_problem(run, resumed, {}) is None
        wait_for(lambda: finished_steps(run)[-1] > resumed, agent)
        agent.send_signal(signal.SIGTERM)
        agent.wait(120)
    said = output.read_text()
    step = finished_steps(run)[-1]
    assert f"stopped after step {step} of stage base, which is saved; continue with: " in said
    assert "another process of the run has ended" in said and said.count(f"run directory: {run}") == 2

    train(config.replace(resume=str(run)))
    train(config.replace(run_dir=str(tmp_path / "one")))
    assert finished_steps(run)[-1] == 150
    for several, one in zip(*(rows(path / "progress.csv") for path in (run, tmp_path / "one")), strict=True):
        values = {name: float(value or 0) for name, value in one.items()}
        assert {name: float(value or 0) for name, value in several.items()} == pytest.approx(values, rel=1e-3)
