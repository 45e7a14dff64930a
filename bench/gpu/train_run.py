"""`tdc_fast.train` itself: steps per second of a real run, beside improved-diffusion's recipe on the same images."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.files import ROOT
from bench.gpu import step
from bench.gpu.recipe import Recipe
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun
from bench.gpu.timing import Budget

RUN = "tdc_fast.train"
STAGE1 = "ours, stage 1"
CAPTURED = "captured step"
STAGE1_STEPS = 200
LOG_INTERVAL = 20
NUM_IMAGES = 4096
POLL_SECONDS = 0.5


def row_of(run: BenchRun, flags: dict[str, Any], batch: int, seconds: float, images: Path | None) -> dict[str, Any]:
    """Train for a while and return the fields of the row: milliseconds per step.

    Args:
        run: the device, and the rows so far, of which the captured step is one.
        flags: of the UNet.
        batch: images per step.
        seconds: how long the run takes, start of the process included; the recipe takes a third.
        images: .npz of `arr_0` (M, H, W, 3) uint8; None makes noise.
    """
    with tempfile.TemporaryDirectory(prefix="tdc-fast-bench-") as folder:
        data = images or noise(Path(folder) / "noise.npz", flags["image_size"], 64 if run.tiny else NUM_IMAGES)
        steps = (4, 6) if run.tiny else (STAGE1_STEPS, 10**9)
        options = {
            **flags, "data_dir": str(data), "run_dir": f"{folder}/run", "groups": step.NUM_GROUPS, "k": 1,
            "batch_size": batch, "precision": "fp32" if run.dtype == torch.float32 else "bf16",
            "stage1_steps": steps[0], "stage2_steps": steps[1], "log_interval": 1 if run.tiny else LOG_INTERVAL,
            "save_interval": 10**9, "tensorboard": False, "progress": "never", "device": run.machine.device.type,
        }  # fmt: skip
        train(options, seconds, in_this_process=run.tiny)
        stages = {OURS: "experts", STAGE1: "base"}
        ms = {name: ms_per_step(Path(folder) / "run" / stage / "progress.csv") for name, stage in stages.items()}
        problem = step.Problem(run, flags, batch)
        with torch.enable_grad():
            recipe = Recipe(problem.base, problem.diffusion, autocast=problem.config.mixed_precision)
            speed = recipe.steps_per_second(data, batch, seconds / 3, workers=0 if run.tiny else 1)
    ms[step.RECIPE] = 1e3 / speed
    captured = [
        row["ms"][OURS_GRAPH]
        for row in run.rows
        if (row["direction"], row["width"], row.get("batch")) == (step.WHOLE, 1.0, batch)
        and not row["wrong"]
        and OURS_GRAPH in row["ms"]
    ]
    if captured:
        ms[CAPTURED] = captured[0]
    return {
        "batch": batch,
        "backend": run.backend or "fastest",
        "error": 0.0,
        "wrong": False,
        "ms": ms,
        "ratios": {name: ms[OURS] / ms[name] for name in (step.RECIPE, CAPTURED) if name in ms},
        "steps_per_s": {name: 1e3 / value for name, value in ms.items()},
        "absent": {},
        "rounds": 1,
    }


def noise(path: Path, size: int, count: int) -> Path:
    """Write random images, for speed does not depend on what they show.

    Args:
        path: of the .npz.
        size: height and width.
        count: number of images.
    """
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return path


def train(options: dict[str, Any], seconds: float, *, in_this_process: bool = False) -> None:
    """Run `tdc_fast.train`, and kill it when the time is up: a checkpoint of all experts would take longer.

    Args:
        options: of the run.
        seconds: from the start of the process.
        in_this_process: call it here and wait for its end, as tests do.

    Raises:
        RuntimeError: it ended by itself with an error.
    """
    if in_this_process:
        from tdc_fast.train import TrainConfig
        from tdc_fast.train import train as run

        with torch.enable_grad(), redirect_stdout(StringIO()):
            run(TrainConfig(**options))
        return
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    stop_after([sys.executable, "-m", "tdc_fast.train", *flags], seconds)


def stop_after(command: list[str], seconds: float) -> None:
    """Run a command and kill it when the time is up.

    Args:
        command: program and arguments.
        seconds: how long it may take.

    Raises:
        RuntimeError: it failed before; with the end of what it printed.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        end = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(min(POLL_SECONDS, seconds))
        finally:
            ended = process.poll()
            process.kill()
            process.wait()
        output.seek(0)
        if ended:
            raise RuntimeError(f"{command[:3]} ended with status {ended}: {output.read()[-600:]}")


def ms_per_step(log: Path) -> float:
    """Milliseconds per step between the second and the last row of a progress.csv; the first has the warm-up.

    Raises:
        RuntimeError: there are not enough rows.
    """
    rows: list[dict[str, str]] = []
    if log.is_file():
        with open(log, encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step") and row.get("wall_seconds")]
    if len(rows) < 3:
        raise RuntimeError(f"{log.parent.name}: the run logged {len(rows)} rows in its time, 3 are needed")
    first, last = rows[1], rows[-1]
    steps, seconds = (float(last[key]) - float(first[key]) for key in ("step", "wall_seconds"))
    return 1e3 * seconds / steps


def run_section(
    run: BenchRun, name: str, flags: dict[str, Any], batch: int, seconds: float, images: Path | None, budget: Budget
) -> None:
    """Adds the row of the run, which takes less than `seconds` where there is less time."""
    seconds = min(seconds, budget.left() / 1.5)
    labels = {"num_groups": step.NUM_GROUPS, "uneven": False, "width": 1.0, "direction": RUN}
    run.row("training", f"{name}, B {batch}", labels, budget, partial(row_of, run, flags, batch, seconds, images))
