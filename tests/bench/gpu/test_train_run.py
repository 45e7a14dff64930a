"""What the bench reads from a real run of training, and how it ends one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.gpu import train_run
from bench.gpu.recipe import RATE, Recipe
from tdc_fast.diffusion import create_diffusion


def test_the_speed_of_a_stage_leaves_out_its_start(tmp_path: Path) -> None:
    log = tmp_path / "progress.csv"
    log.write_text("step,loss,wall_seconds\n20,1,30.0\n40,1,31.0\n60,1,32.5\n80,1,33.0\n")
    assert train_run.ms_per_step(log) == pytest.approx(1e3 * 2.0 / 40)
    log.write_text("step,loss,wall_seconds\n20,1,30.0\n40,1,31.0\n60,1\n")  # the last row is being written
    with pytest.raises(RuntimeError, match="logged 2 rows"):
        train_run.ms_per_step(log)
    with pytest.raises(RuntimeError, match="logged 0 rows"):
        train_run.ms_per_step(tmp_path / "none.csv")


def test_a_run_is_ended_when_its_time_is_up(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    script = f"import time, pathlib\npathlib.Path({str(file)!r}).touch()\ntime.sleep(60)"
    start = time.monotonic()
    train_run.stop_after([sys.executable, "-c", script], 1.0)
    assert file.exists() and time.monotonic() - start < 30


def test_a_run_that_fails_says_what_it_printed() -> None:
    with pytest.raises(RuntimeError, match="status 3: .*lr: got -1"):
        train_run.stop_after([sys.executable, "-c", "print('lr: got -1'); raise SystemExit(3)"], 30.0)


class Tiny(nn.Module):
    """A denoiser of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_the_recipe_trains_and_averages(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    recipe = Recipe(model, create_diffusion(diffusion_steps=20, noise_schedule="cosine"), autocast=False)
    assert recipe.step(torch.rand(4, 3, 4, 4)) > 0
    moved = model.weight.item() - 0.5
    assert abs(moved) == pytest.approx(1e-4, rel=1e-2)  # AdamW's first step is the learning rate
    assert recipe._average[0].item() - 0.5 == pytest.approx(moved * (1 - RATE), abs=1e-7)
    images = train_run.noise(tmp_path / "noise.npz", 4, 12)
    assert recipe.steps_per_second(images, 4, 0.05, workers=0) > 0
