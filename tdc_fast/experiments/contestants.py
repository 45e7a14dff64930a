"""The models that the demo compares: one shared stage 1, and what continues from it at a given training cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tdc_fast.runs.checkpoint import model_file
from tdc_fast.runs.config import TrainConfig
from tdc_fast.training import cost

STAGE1_SHARE = 0.5
REDUCED_COST = 0.8
NUM_GROUPS = 4
PRUNED_K = 0.6
STAGE2_BATCH = 32
SMALL_BATCH = STAGE2_BATCH // NUM_GROUPS  # images per expert in it

SETTINGS = {
    "data_dir": "digits",
    "image_size": 8,
    "heldout": 0.2,
    "num_channels": 4,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_heads": 1,
    "attention_resolutions": "",
    "noise_schedule": "cosine",
    "batch_size": 64,
    "lr": 2e-3,
    "ema_rate": "0.999",
    "ema_ramp": True,
    "num_threads": 1,
    "log_interval": 10,
    "save_interval": 500,
    "tensorboard": False,
    "progress": "never",
}
"""Settings of all models. One thread each: such small networks gain nothing from a second one, while two models train
side by side."""


@dataclass(frozen=True)
class Contestant:
    """One model of the comparison and the run that trains it.

    Attributes:
        key: short name, in file names and JSON.
        label: name in tables and figures.
        description: how it is trained, in one sentence.
        config: the configuration of its run.
    """

    key: str
    label: str
    description: str
    config: TrainConfig

    @property
    def family(self) -> Literal["uniform", "experts"]:
        """Whether it is one denoiser for all timesteps, or experts."""
        return "experts" if self.config.groups else "uniform"

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_dir)

    @property
    def progress(self) -> Path:
        """The progress.csv of its last stage."""
        return self.directory / ("experts/progress.csv" if self.config.groups else "progress.csv")

    @property
    def last_step(self) -> int:
        """The step at which that stage ends; 0 where it follows from a budget."""
        return self.config.stage2_steps if self.config.groups else cost.stage1_steps(self.config) or 0


def stage1(out: Path, baseline_steps: int, seed: int) -> Contestant:
    """The uniform training at a constant learning rate that every model starts from.

    Args:
        out: folder of the runs.
        baseline_steps: steps of the uniform baseline at cost C.
        seed: training seed.
    """
    steps = round(STAGE1_SHARE * baseline_steps)
    config = TrainConfig.from_dict({**SETTINGS, "seed": seed, "run_dir": str(out / "stage1"), "stage1_steps": steps})
    return Contestant("stage1", "stage 1", "shared by all", config)


def contestants(
    out: Path, baseline_steps: int, seed: int, control: bool, time: Mapping[str, str] | None = None
) -> tuple[Contestant, ...]:
    """All models of the demo, the baseline (the uniform baseline at cost C) first.

    Args:
        out: folder of the runs.
        baseline_steps: steps of the uniform baseline at cost C.
        seed: training seed.
        control: include the uniform baseline with small batches.
        time: options of `TimeOptions` for the pruned experts; None takes their defaults.
    """
    first = stage1(out, baseline_steps, seed)
    start = round(STAGE1_SHARE * baseline_steps)
    checkpoint = str(first.directory / model_file(start))
    reduced = round(REDUCED_COST * baseline_steps)

    def uniform(name: str, end: int, **changes: int) -> TrainConfig:
        return first.config.replace(
            run_dir=str(out / name),
            resume_checkpoint=checkpoint,
            stage1_steps=0,
            lr_anneal_start=start,
            lr_anneal_steps=end,
            **changes,
        )

    def experts(name: str, cost: float, k: float, **changes: str) -> TrainConfig:
        return first.config.replace(
            run_dir=str(out / name),
            base=str(first.directory),
            stage1_steps=0,
            groups=NUM_GROUPS,
            grouping="uniform",
            k=k,
            stage2_batch=STAGE2_BATCH,
            baseline_steps=baseline_steps,
            total_share=cost,
            **changes,
        )

    changes = dict(time or {})
    of_time = " of the base's time" if changes.get("budget_in") == "latency" else ""
    found = [
        Contestant(
            "uniform",
            "uniform, C",
            "One denoiser for all timesteps; the learning rate falls to 0 over the second half.",
            uniform("uniform", baseline_steps),
        ),
        Contestant(
            "uniform-80",
            "uniform, 0.8 C",
            "The same training, but its learning rate falls to 0 at 0.8 C, where it ends.",
            uniform("uniform-80", reduced),
        ),
        Contestant(
            "experts",
            "experts, whole, C",
            f"{NUM_GROUPS} whole copies of stage 1 as experts, each fine-tuned on its own timesteps.",
            experts("experts", 1.0, 1.0),
        ),
        Contestant(
            "pruned",
            "experts, pruned, 0.8 C",
            f"{NUM_GROUPS} experts pruned to their budgets (k = {PRUNED_K}{of_time}) and fine-tuned on their own "
            "timesteps.",
            experts("pruned", REDUCED_COST, PRUNED_K, **changes),
        ),
    ]
    if control:
        factor = first.config.batch_size // SMALL_BATCH
        found.insert(
            2,
            Contestant(
                "uniform-80-small",
                "uniform, 0.8 C, small batch",
                f"As above, but after stage 1 with {factor} times the steps on {SMALL_BATCH} images each, as many as "
                "an expert gets in a step: small batches alone help.",
                uniform("uniform-80-small", start + factor * (reduced - start), batch_size=SMALL_BATCH),
            ),
        )
    return tuple(found)
