"""How the models of the tables are trained: a study (data, denoiser, cost C) and the recipes of its models.

Models of one seed that have the same stage 1 share it, so that they differ only in what follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdc_fast.data.image_sources import OnCorrupt
from tdc_fast.experiments.contestants import SETTINGS, Contestant
from tdc_fast.nn.merging import Merging
from tdc_fast.pruning.budget import budget_law
from tdc_fast.runs.checkpoint import model_file
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.runs.options import TimeOptions, time_options

TIMED = "-latency"
"""What the name of a study ends with where its experts' budgets or widths follow time."""


@dataclass(frozen=True)
class Study:
    """A dataset, a denoiser, the training cost C, and how models are measured.

    Attributes:
        name: name of the study on the command line.
        baseline_steps: C is this many uniform steps of `batch_size` images.
        settings: settings of all models.
        experts: further settings of the TDC models.
        sampling_steps: DDIM steps.
        loss_points: timesteps in each quarter at which the held-out loss is measured.
    """

    name: str
    baseline_steps: int
    settings: Mapping[str, Any]
    experts: Mapping[str, Any]
    sampling_steps: int = 25
    loss_points: int = 25

    def scaled(self, scale: float) -> Study:
        """The same study with `scale` times the steps."""
        return dataclasses.replace(self, baseline_steps=max(16, round(scale * self.baseline_steps)))

    def in_time(self, options: TimeOptions) -> Study:
        """The same study with experts whose budgets or widths follow the time that layers take."""
        time = time_options(options)
        if time == time_options(TimeOptions()):
            return self
        return dataclasses.replace(self, name=f"{self.name}{TIMED}", experts={**self.experts, **time})

    @property
    def tells_time(self) -> bool:
        """Whether its plans tell the estimated time of experts."""
        return self.experts.get("budget_in") == "latency" or bool(self.experts.get("latency_table"))

    @property
    def dataset(self) -> tuple[str, int, OnCorrupt]:
        """Its images: their name or path, their size, and what to do with unreadable ones."""
        return self.settings["data_dir"], self.settings["image_size"], self.settings.get("on_corrupt", "error")

    @property
    def small_batch(self) -> int:
        """Images of a stage-2 batch per expert: the batch size of the fair uniform baseline."""
        return int(self.experts["stage2_batch"]) // int(self.experts["groups"])

    @property
    def small_factor(self) -> int:
        """Number of steps on a small batch that cost as much as one of the study's steps."""
        return int(self.settings["batch_size"]) // self.small_batch


# The demo's settings with less logging and fewer checkpoints (the end of a stage is always saved).
_DIGITS = {**SETTINGS, "log_interval": 50, "save_interval": 1000000}
_PHOTOS = {**_DIGITS, "data_dir": "photos", "image_size": 16}
# The defaults of tdc_fast.train, except for the number of groups and a small batch.
_EXPERTS = {"groups": 4, "grouping": "uniform", "k": 0.6, "stage1_share": 0.5, "stage2_batch": 32}
IMAGES = {
    "heldout": 0.2,
    "noise_schedule": "cosine",
    "lr": 3e-4,
    "ema_rate": "0.999",
    "ema_ramp": True,
    "num_threads": 1,  # of the worker that trains, also where what its times are is asked elsewhere
    "tensorboard": False,
    "progress": "never",
}
"""Settings of the study "images" that its options do not choose."""

STUDIES = {
    study.name: study
    for study in (
        # A denoiser with too little capacity, for which the method is meant, and one with enough. Photos for as many
        # steps as keep a table within 40 CPU minutes, and for three times as many.
        Study("digits", 4000, {**_DIGITS, "num_channels": 4}, _EXPERTS),
        Study("digits-wide", 4000, {**_DIGITS, "num_channels": 8}, _EXPERTS),
        Study("photos", 1000, {**_PHOTOS, "num_channels": 4}, _EXPERTS, sampling_steps=10, loss_points=10),
        Study("photos-long", 3000, {**_PHOTOS, "num_channels": 4}, _EXPERTS),
    )
}


def images_study(data_dir: str, batch_size: int, baseline_steps: int, groups: int = 4, **settings: Any) -> Study:
    """The study "images": a folder or array of images, a UNet of improved-diffusion and an expert per group.

    Args:
        data_dir: as for `tdc_fast.train`.
        batch_size: images per step of stage 1 and of the uniform baseline, and of all experts together.
        baseline_steps: C in steps.
        groups: number of groups of timesteps.
        **settings: further settings of all models.
    """
    common = {
        **IMAGES,
        "log_interval": min(50, max(1, baseline_steps // 32)),
        "save_interval": max(1000, baseline_steps // 2),  # a few checkpoints per run: they are large
    }
    return Study(
        "images",
        baseline_steps,
        {**common, **settings, "data_dir": data_dir, "batch_size": batch_size},
        {**_EXPERTS, "groups": groups, "stage2_batch": batch_size},
    )


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        key: names its folder; models of equal key are trained once.
        label: name in the table.
        cost: training cost as a share of C.
        experts: None for one uniform denoiser, else changes to the study's TDC settings ({} for none).
        by_group: further settings that are lists of a number per group: (first, last), the groups between in equal
            ratios. The first group has the highest SNR.
        small_batch: after stage 1, train on an expert's batch size, with more steps for the same cost.
        mean_budget: prune to the mean of the budgets of the study's experts.
        small_stage1: train stage 1 in the same way.
        from_scratch: a stage 1 of a single step, so that the experts start from practically untrained weights.
        merging: the experts of another recipe, merged into one dense model; nothing is trained for it.
        run: key of that recipe, whose run it is; empty for the recipe's own.
    """

    key: str
    label: str
    cost: float = 1.0
    experts: Mapping[str, Any] | None = None
    by_group: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    small_batch: bool = False
    mean_budget: bool = False
    small_stage1: bool = False
    from_scratch: bool = False
    merging: Merging | None = None
    run: str = ""


def merged(recipe: Recipe, scale: float) -> Recipe:
    """The recipe of the same experts, merged: base + scale * the mean of (expert - base), their average at 1."""
    how = "averaged" if scale == 1 else f"merged, scale {scale:g}"
    return dataclasses.replace(
        recipe,
        key=f"{recipe.key}-merged-{scale:g}",
        label=f"{recipe.label}, {how}",
        merging=Merging() if scale == 1 else Merging(method="task_arithmetic", scale=scale),
        run=recipe.key,
    )


def stage1(study: Study, recipe: Recipe, seed: int, folder: Path) -> Contestant:
    """The stage 1 of a recipe: uniform training at a constant learning rate."""
    steps = 1 if recipe.from_scratch else round(stage1_share(study, recipe) * study.baseline_steps)
    settings = {**study.settings, "seed": seed}
    name = f"stage1-{steps}"
    if recipe.small_stage1:
        name += "-small"
        steps *= study.small_factor
        settings["batch_size"] = study.small_batch
    settings |= {"run_dir": str(folder / name), "stage1_steps": steps}
    return Contestant(name, name, "", TrainConfig.from_dict(settings))


def stage1_share(study: Study, recipe: Recipe) -> float:
    """The cost of a recipe's stage 1 as a share of C."""
    return float((recipe.experts or {}).get("stage1_share", study.experts["stage1_share"]))


def _in_equal_ratios(ends: tuple[float, float], count: int) -> str:
    """A comma list of numbers from the first to the last."""
    first, last = ends
    return ",".join(f"{first * (last / first) ** (i / max(count - 1, 1)):.6g}" for i in range(count))


def mean_budget(experts: Mapping[str, Any]) -> float:
    """The mean of the budgets of experts with these settings, as a share of the base's MACs."""
    budgets = comma_numbers("budgets", experts.get("budgets", ""), float) or budget_law(experts["groups"], experts["k"])
    return sum(budgets) / len(budgets)


def contestant(study: Study, recipe: Recipe, seed: int, folder: Path) -> tuple[Contestant, Contestant]:
    """The stage 1 and the model of a recipe, trained with one seed in a folder of their own."""
    first = stage1(study, recipe, seed, folder)
    start = first.config.stage1_steps
    directory = str(folder / (recipe.run or recipe.key))
    batch = {"stage2_batch": study.small_batch} if recipe.small_batch else {}
    budget = {"budgets": f"{mean_budget(study.experts):g}"} if recipe.mean_budget else {}
    if recipe.experts is None:
        left = round(recipe.cost * study.baseline_steps) - round(stage1_share(study, recipe) * study.baseline_steps)
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
        experts = {**study.experts, **recipe.experts, **batch}
        groups = int(experts["groups"])
        # A table is of the study's own batch and number of groups: times of other experts are estimated without it.
        same = all(experts[name] == study.experts[name] for name in ("groups", "stage2_batch"))
        table = {} if same else {"latency_table": ""}
        config = first.config.replace(
            **{
                **study.experts,
                **recipe.experts,
                **{name: _in_equal_ratios(ends, groups) for name, ends in recipe.by_group.items()},
                **batch,
                **budget,
                **table,
                "run_dir": directory,
                "base": str(first.directory),
                "batch_size": study.settings["batch_size"],
                "stage1_steps": 0,
                "baseline_steps": study.baseline_steps,
                "total_share": recipe.cost,
            }
        )
    return first, Contestant(recipe.key, recipe.label, "", config)
