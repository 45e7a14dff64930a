"""The study of one's own images in miniature: noise as images, one row of each kind, 64 steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.paper import images, sizing
from bench.paper.images import ImagesOptions
from bench.paper.sizing import Paces
from bench.paper.tables import TABLES

OF_THE_TABLE = ["uniform", "uniform-80", "uniform-small-80", "one", "tdc"]
VARIANTS = {"shared-pairs": "variant-shared-pairs", "whole-slope": "variant-slope-whole"}
TRAINED = [*OF_THE_TABLE, *VARIANTS.values()]
MERGED = "-merged-1.5"
KEYS = [key for name in TRAINED for key in (name, name + MERGED) if key == name or name in ("tdc", *VARIANTS.values())]
TABLE = replace(TABLES["main"], rows=tuple(row for row in TABLES["main"].rows if row.key in OF_THE_TABLE))
STEPS = 64  # the fewest of which pruning's calibration leaves some


def options_in(folder: Path, device: str, **changes: Any) -> ImagesOptions:
    """Options of the study, with images and results in a folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", pixels)
    options = ImagesOptions(
        data_dir=str(folder / "noise.npz"),
        out=str(folder / "out"),
        device=device,
        minutes=1,
        image_size=8,
        num_channels=4,
        channel_mult="1,2",
        num_res_blocks=1,
        attention_resolutions="",
        batch_size=8,
        groups=2,
        variants=",".join(VARIANTS),
        merged="1.5",
        samples=24,
        draws=2,
        sampling_steps=4,
        loss_points=2,
    )
    return replace(options, **changes)


def run(options: ImagesOptions, assumed: Paces) -> list[Paces]:
    """Run the study; its warm-up is real, but does not decide the steps.

    Args:
        options: of the study.
        assumed: paces to decide by, so that the machine's do not matter.

    Returns:
        What the warm-up measured.
    """
    measured: list[Paces] = []

    def decide(study: Any, rows: Any, paces: Paces, minutes: float, least: int) -> sizing.Sizing:
        measured.append(paces)
        return replace(sizing.decide(study, rows, assumed, 10**4, least), baseline_steps=STEPS, seconds=30.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "TABLE", TABLE)
        patch.setattr(images, "decide", decide)
        patch.setattr(sizing, "WARM_STEPS", 4)
        patch.setattr(sizing, "ROW_STEPS", 2)
        images.run_images(options, in_process=True)
    return measured
