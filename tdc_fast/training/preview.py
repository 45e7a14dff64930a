"""A few images sampled at the end of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdc_fast.atomic import atomic_file, remove_leftovers
from tdc_fast.data.pixels import grid_image, to_uint8
from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.sampling_loop import sample
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.training.random_state import derived_seed

STEPS = 25
"""Sampling steps."""


def preview_file(run: RunDirectory, stage: str, step: int) -> Path:
    """The picture of a stage."""
    return run.path / "samples" / f"{stage}_{step:06d}.png"


def write_preview(run: RunDirectory, stage: str, step: int, model: nn.Module, diffusion: Diffusion) -> None:
    """Write `--preview` DDIM samples as one row of images, unless the picture is there already.

    Args:
        run: the run.
        stage: "base" or "experts".
        step: step of the stage.
        model: the denoiser.
        diffusion: its process.
    """
    config, picture = run.config, preview_file(run, stage, step)
    if not config.preview or picture.is_file():
        return
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "preview"))
    size, device = config.image_size, next(model.parameters()).device
    labels: dict[str, Any] = {}
    if config.class_cond:
        every = range(config.label_rows if config.null_class is None else config.null_class)
        classes = torch.tensor(every if run.classes is None else run.classes)
        labels["y"] = classes[torch.randint(len(classes), (config.preview,), generator=generator)].to(device)
    steps = min(STEPS, diffusion.num_timesteps)
    shape = (config.preview, run.in_channels, size, size)
    images = sample(diffusion, model, shape, steps=steps, generator=generator, model_kwargs=labels, device=device)
    picture.parent.mkdir(exist_ok=True)
    remove_leftovers(picture.parent)
    image = grid_image(to_uint8(images), columns=config.preview, gap=0)
    with atomic_file(picture) as file:
        image.save(file, format="PNG")
