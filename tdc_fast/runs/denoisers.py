"""Trained denoisers for the command lines: from a run directory, or from one file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tdc_fast.diffusion import Diffusion
from tdc_fast.errors import invalid
from tdc_fast.runs.build import build_diffusion, build_unet
from tdc_fast.runs.config import TrainConfig, read_options
from tdc_fast.runs.loading import Run, load_run
from tdc_fast.runs.options import DiffusionOptions, ModelOptions
from tdc_fast.runs.weights import load_weights, read_description

Which = Literal["auto", "experts", "base"]
FACTS = tuple(field.name for section in (ModelOptions, DiffusionOptions) for field in fields(section))
"""The flags that say what a file of weights is."""
FREE_AT_SAMPLING = frozenset({"timestep_respacing", "dropout", "use_checkpoint", "in_channels"})
"""Those of them that a sampler may choose for itself."""


@dataclass(frozen=True)
class TrainedDenoiser:
    """A model that answers `model(x, t)` for original timesteps, and what is needed to sample from it."""

    model: nn.Module
    diffusion: Diffusion
    image_size: int
    channels: int
    num_classes: int  # 0 when the model is not class conditional
    name: str
    config: TrainConfig
    run: Run | None = None  # where it came from one

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.image_size, self.image_size)


def stored_facts(*, run: str = "", model_path: str = "") -> dict[str, Any]:
    """The flags in `FACTS` that a run directory, or the description beside a file of weights, records.

    Empty for a file of improved-diffusion, which has no description.
    """
    if run:
        path = Path(run) / "config.json"
        if not path.is_file():
            raise invalid("run", run, "a run directory: one with a config.json")
        values, channels = read_options(path), read_options(path.with_name("run.json")).get("in_channels", 0)
    else:
        description = read_description(Path(model_path)) or {}
        if description.get("stage") == "experts":
            raise invalid("model_path", model_path, "a single denoiser; sample a run's experts with --run RUN")
        values, channels = description.get("config", {}), description.get("in_channels", 0)
    facts = {name: values[name] for name in FACTS if name in values}
    return {**facts, "in_channels": channels} if facts else {}


def refuse_mismatch(source: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError naming the first flag that contradicts what `source` was trained with."""
    for name, value in stored.items():
        if name not in FREE_AT_SAMPLING and wanted[name] != value:
            raise invalid(name, wanted[name], f"{value!r}, with which {source} was trained")


def from_run(path: str | Path, which: Which = "auto", timestep_respacing: str = "") -> TrainedDenoiser:
    """The averaged (EMA) weights of a run: with "auto" its experts where it has any, else its base.

    Raises ValueError where the run does not exist or lacks what is asked for.
    """
    run = load_run(path)
    config: TrainConfig = run.config
    has_experts = bool(config.groups and run.steps("experts"))
    use_experts = which == "experts" or (which == "auto" and has_experts)
    model = run.experts() if use_experts else run.base()
    return TrainedDenoiser(
        model=model.eval(),
        diffusion=build_diffusion(config, timestep_respacing),
        image_size=config.image_size,
        channels=run.in_channels,
        num_classes=config.num_classes if config.class_cond else 0,
        name=f"{path} ({'experts' if use_experts else 'base'})",
        config=config,
        run=run,
    )


def from_checkpoint(path: str | Path, facts: Mapping[str, Any]) -> TrainedDenoiser:
    """The weights in a file, in the UNet and with the diffusion that the flags `facts` describe.

    Raises ValueError when the file is missing or damaged, or holds other weights than the flags describe.
    """
    channels = facts["in_channels"] or 3  # as all of improved-diffusion's
    config = TrainConfig.from_dict({**{name: facts[name] for name in FACTS}, "in_channels": channels})
    model = build_unet(config, channels)
    load_weights(Path(path), config, model, "model_path")
    return TrainedDenoiser(
        model=model.eval(),
        diffusion=build_diffusion(config),
        image_size=config.image_size,
        channels=channels,
        num_classes=config.num_classes if config.class_cond else 0,
        name=str(path),
        config=config,
    )
