"""How the models of the tables are trained: a study (data, denoiser, cost C) and recipes within it.

All models of one seed go on from the same stage 1 where they have one, so that differences are those of what follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_fast.experiments.contestants import SETTINGS, Contestant
from tdc_fast.runs.checkpoint import model_file
from tdc_fast.runs.config import TrainConfig


@dataclass(frozen=True)
class Study:
    """A dataset, a denoiser, what cost C means (`baseline_steps` steps of `batch_size` images), how it is measured."""

    name: str
    baseline_steps: int
    settings: Mapping[str, Any]
    experts: Mapping[str, Any]  # what every TDC row starts from
    sampling_steps: int = 25  # of DDIM
    loss_points: int = 25  # timesteps of each quarter at which the held-out loss is measured

    def scaled(self, scale: float) -> Study:
        """The same with `scale` times the steps."""
        return dataclasses.replace(self, baseline_steps=max(16, round(scale * self.baseline_steps)))

    @property
    def small_batch(self) -> int:
        """What an expert sees of a stage-2 batch: the fair control trains on no more."""
        return int(self.experts["stage2_batch"]) // int(self.experts["groups"])

    @property
    def small_factor(self) -> int:
        """How many small steps cost as much as one of the study's own."""
        return int(self.settings["batch_size"]) // self.small_batch


# As the demo trains, with fewer rows and checkpoints (the end of a stage is always saved).
_DIGITS = {**SETTINGS, "log_interval": 50, "save_interval": 1000000}
_PHOTOS = {**_DIGITS, "data_dir": "photos", "image_size": 16}
# The defaults of tdc_fast.train, but for the number of groups and a small batch.
_EXPERTS = {"groups": 4, "grouping": "uniform", "k": 0.6, "stage1_share": 0.5, "stage2_batch": 32}

STUDIES = {
    study.name: study
    for study in (
        # A denoiser that is short of capacity, as those are that the method is for; and one that is not. Photos for as
        # long as leaves a table within 40 CPU minutes, and three times as long.
        Study("digits", 4000, {**_DIGITS, "num_channels": 4}, _EXPERTS),
        Study("digits-wide", 4000, {**_DIGITS, "num_channels": 8}, _EXPERTS),
        Study("photos", 1000, {**_PHOTOS, "num_channels": 4}, _EXPERTS, sampling_steps=10, loss_points=10),
        Study("photos-long", 3000, {**_PHOTOS, "num_channels": 4}, _EXPERTS),
    )
}


@dataclass(frozen=True)
class Recipe:
    """One way to spend `cost` (a share of C). `key` names its folder; equal keys are trained once.

    experts      : None for one uniform denoiser, else changes to the study's TDC settings ({} for none).
    small_batch  : after stage 1, steps as small as an expert's, and as many more of them.
    small_stage1 : stage 1 itself in such steps.
    from_scratch : a stage 1 of a single step: the experts begin from what are as good as fresh weights.
    """

    key: str
    label: str
    cost: float = 1.0
    experts: Mapping[str, Any] | None = None
    small_batch: bool = False
    small_stage1: bool = False
    from_scratch: bool = False


def stage1(study: Study, recipe: Recipe, seed: int, folder: Path) -> Contestant:
    """Uniform training at a constant learning rate for its share of C; one step where experts start from scratch."""
    steps = 1 if recipe.from_scratch else round(_stage1_share(study, recipe) * study.baseline_steps)
    settings = {**study.settings, "seed": seed}
    name = f"stage1-{steps}"
    if recipe.small_stage1:
        name += "-small"
        steps *= study.small_factor
        settings["batch_size"] = study.small_batch
    settings |= {"run_dir": str(folder / name), "stage1_steps": steps}
    return Contestant(name, name, "", TrainConfig.from_dict(settings))


def _stage1_share(study: Study, recipe: Recipe) -> float:
    return float((recipe.experts or {}).get("stage1_share", study.experts["stage1_share"]))


def contestant(study: Study, recipe: Recipe, seed: int, folder: Path) -> tuple[Contestant, Contestant]:
    """(its stage 1, the model) of a recipe at one seed; `folder` holds the seed's runs."""
    first = stage1(study, recipe, seed, folder)
    start = first.config.stage1_steps
    directory = str(folder / recipe.key)
    if recipe.experts is None:
        left = round(recipe.cost * study.baseline_steps) - round(_stage1_share(study, recipe) * study.baseline_steps)
        if recipe.small_batch:
            left *= study.small_factor
        config = first.config.replace(
            run_dir=directory,
            resume_checkpoint=str(first.directory / model_file(start)),
            stage1_steps=0,
            lr_anneal_start=start,
            lr_anneal_steps=start + left,
            batch_size=study.small_batch if recipe.small_batch else study.settings["batch_size"],
        )
    else:
        config = first.config.replace(
            **{
                **study.experts,
                **recipe.experts,
                "run_dir": directory,
                "base": str(first.directory),
                "batch_size": study.settings["batch_size"],
                "stage1_steps": 0,
                "baseline_steps": study.baseline_steps,
                "total_share": recipe.cost,
            }
        )
    return first, Contestant(recipe.key, recipe.label, "", config)
