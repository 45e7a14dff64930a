"""A TDC run that takes a second: 8x8 noise images, an 8-channel UNet, a few steps of each stage."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tdc_fast.training import TrainConfig

SETTINGS: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 8,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_heads": 2,
    "attention_resolutions": "4",
    "diffusion_steps": 60,
    "noise_schedule": "cosine",
    "batch_size": 6,
    "lr": 1e-3,
    "ema_rate": "0.9,0.99",
    "log_interval": 3,
    "save_interval": 4,
    "tensorboard": False,
    "progress": "never",
}
STAGE2_OPTIONS: dict[str, Any] = {
    "shared_layers": "convolutions,attention,level1:2", "stage2_lr_factors": "1,0.5,0.25",
    "stage2_ema_factors": "1,2,0.5", "stage2_slope_windows": 10, "distillation_weight": 0.5,
}  # fmt: skip
"""What a stage of three experts may do besides its defaults."""
TWO_STAGES: dict[str, Any] = {"groups": 3, "stage1_steps": 10, "stage2_steps": 10, "k": 0.7, "calibration_batches": 1}


def write_images(folder: Path, count: int = 20, channels: int = 1) -> Path:
    """An .npz of smooth random uint8 images with labels 0 to 3."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.repeat(rng.integers(0, 256, (count, 4, 4, channels), dtype=np.uint8), 2, axis=1), 2, axis=2)
    path = folder / "images.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(count) % 4)
    return path


def small_config(folder: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """A configuration whose run directory is `folder / name`."""
    data = folder / "images.npz"
    if not data.exists():
        write_images(folder)
    return TrainConfig(**{**SETTINGS, "data_dir": str(data), "run_dir": str(folder / name), **changes})


def flags(config: TrainConfig) -> list[str]:
    """The command line of a configuration: what differs from the defaults."""
    defaults = TrainConfig().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    return [part for name, value in changed.items() for part in (f"--{name}", str(value))]


def rows(path: Path) -> list[dict[str, str]]:
    """progress.csv without its wall-clock columns."""
    with open(path, encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if not k.startswith("wall_")} for row in csv.DictReader(file)]


def differences(one: Path, other: Path) -> list[str]:
    """Files in which two finished runs differ, apart from times and names of the directories."""
    found = []
    for path in sorted(p for p in one.rglob("*") if p.is_file()):
        twin = other / path.relative_to(one)
        if not twin.is_file():
            found.append(f"{twin} is missing")
        elif path.name == "progress.csv":
            found += [] if rows(path) == rows(twin) else [f"{path} has other rows"]
        elif path.suffix == ".pt" and not path.name.startswith("state"):  # a state holds the time spent
            found += [] if path.read_bytes() == twin.read_bytes() else [str(path)]
        elif path.name in ("groups.json", "widths.json", "macs.json", "config.json"):
            same = path.read_text().replace(str(one), "RUN") == twin.read_text().replace(str(other), "RUN")
            found += [] if same or path.name == "config.json" else [str(path)]
    return found + [f"{p} is extra" for p in other.rglob("*") if not (one / p.relative_to(other)).exists()]


def train_in_child(argv: list[str], output: str, kill_at_rename: int = 0) -> None:
    """Target of a process: the command line, with output into a file; dies by SIGKILL instead of the n-th rename."""
    sys.stdout = sys.stderr = open(output, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    if kill_at_rename:
        rename, done = os.replace, [0]

        def dying_rename(source: Any, target: Any) -> None:
            done[0] += 1
            if done[0] == kill_at_rename:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = dying_rename  # type: ignore[assignment]
    from tdc_fast.train import main

    os._exit(main(argv))


def train_on_terminal(argv: list[str], terminal: str) -> None:
    """Target of a process: the command line, as the leader of a terminal's session with all output there."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)  # a session's first terminal becomes its own
    for number in (0, 1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    from tdc_fast.train import main

    os._exit(main(argv))
