"""Reading a run: its configuration, process, groups, widths, and its models with averaged or raw weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tdc_fast.diffusion import Diffusion
from tdc_fast.errors import invalid
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.width_plan import WidthPlan, base_hash
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_diffusion
from tdc_fast.runs.checkpoint import ema_file, finished_steps, model_file
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import build_groups, load_groups
from tdc_fast.runs.weights import base_with_weights, read_description, read_state
from tdc_fast.runs.widths import find_plan, plan_hash


class Run:
    """A run directory opened for reading; see `load_run`."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def config(self) -> TrainConfig:
        """The options that the run was made with."""
        return self.directory.config

    @property
    def in_channels(self) -> int:
        """Channels of the run's images."""
        return self.directory.in_channels

    @cached_property
    def diffusion(self) -> Diffusion:
        """The diffusion process."""
        return build_diffusion(self.config)

    @cached_property
    def groups(self) -> TimestepGroups | None:
        """The timestep groups in groups.json; None for plain training."""
        if not self.config.groups:
            return None
        groups = load_groups(self.directory)
        described = build_groups(self.config)
        if described is not None and groups != described:
            path = self.path / "groups.json"
            raise invalid("groups", str(path), "the groups that config.json describes; the file is of another run")
        return groups

    @cached_property
    def widths(self) -> WidthPlan | None:
        """What each expert keeps; None when the experts are whole."""
        path = find_plan(self.directory)
        return WidthPlan.load(path) if path else None

    @property
    def macs(self) -> dict[str, Any] | None:
        """The content of macs.json; None before the first phase has ended."""
        return self.directory.read("macs.json")

    def steps(self, stage: str) -> list[int]:
        """Steps of the stage's checkpoints ("base" or "experts"), ascending."""
        return finished_steps(self.directory.stage_directory(stage))

    def base(self, ema: bool | str = True, step: int = -1) -> UNet:
        """The dense base in evaluation mode.

        Args:
            ema: True for the averages of the first rate, a rate as written for those of that rate, False for the raw
                weights.
            step: which checkpoint; -1 is the latest.
        """
        return base_with_weights(self.directory, self._weight_file("base", ema, step), torch.device("cpu"))

    def experts(self, ema: bool | str = True, step: int = -1) -> RoutedModel:
        """The experts as one RoutedModel in evaluation mode; arguments as in `base`.

        Raises:
            ValueError: the run has no experts, or its files do not belong together.
        """
        if self.groups is None:
            raise invalid("experts", str(self.path), "a run with --groups N; this one has a base alone")
        base = self.base()
        if self.widths is not None:
            self.widths.check(base.pruning_units(), base=base_hash(base), boundaries=self.groups.boundaries)
        model = pack_experts(base, self.groups, self.widths, shared_layers=self.config.shared_layers)
        path = self._weight_file("experts", ema, step)
        self._check_plan_of(path)
        model.load_state_dict(read_state(path, model.state_dict()))
        return model.eval()

    def _check_plan_of(self, path: Path) -> None:
        """Refuse a widths.json other than the one that experts were trained with, as their description records."""
        described, ours = read_description(path), plan_hash(self.widths)
        if described is not None and described.get("widths_hash", ours) != ours:
            plan = self.path / "widths.json"
            remedy = f"the plan of these experts: --resume {self.path} finds it again"
            raise invalid("widths", f"{plan}{'' if plan.is_file() else ' (missing)'}", remedy)

    def _weight_file(self, stage: str, ema: bool | str, step: int) -> Path:
        directory = self.directory.stage_directory(stage)
        steps = finished_steps(directory)
        if not steps:
            remedy = f"a run with weights of its {stage}; python -m tdc_fast.train --resume {self.path} continues it"
            raise invalid("run", str(self.path), remedy)
        if step != -1 and step not in steps:
            raise invalid("step", step, f"one of which {directory} has weights: {', '.join(map(str, steps))}")
        chosen = steps[-1] if step == -1 else step
        rate = self.config.ema_rates[0] if ema is True else ema
        return directory / (ema_file(str(rate), chosen) if rate else model_file(chosen))


def load_run(path: str | Path) -> Run:
    """Open a run directory for sampling, evaluation or a report.

    Args:
        path: the run directory.

    Raises:
        ValueError: there is no run, or its files do not belong together.
    """
    return Run(RunDirectory.open(path))
