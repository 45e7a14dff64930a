"""The timestep groups of a run: built from its configuration, or loaded from groups.json."""

from __future__ import annotations

import numpy as np

from tdc_fast.errors import invalid
from tdc_fast.grouping import Division, Probes, divide
from tdc_fast.grouping.difficulty import mean_over_probes
from tdc_fast.grouping.intervals import scatter_of_values
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_diffusion
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.limits import comma_numbers


def needs_base(config: TrainConfig) -> bool:
    """Whether the groups depend on the base's weights, and so are known only after stage 1."""
    measured = config.grouping == "similarity" or (config.grouping == "difficulty" and "loss" in config.difficulty)
    return config.groups != 0 and (config.refine > 0 if config.boundaries else measured)


def difficulty_groups(
    config: TrainConfig, probes: Probes, levels: np.ndarray, *, report: bool = False
) -> TimestepGroups:
    """Groups of whole probes with the least scatter of difficulty inside the groups.

    Args:
        config: number of groups.
        probes: P probes.
        levels: difficulty of every probe in decibels, (P,).
        report: print the elbow's costs, if it chooses the number.
    """
    found = divide(scatter_of_values(levels, probes.sizes), given_number(config), max_intervals=config.max_groups)
    if report:
        say_elbow(config, found)
    return probes.groups(found.cuts, "difficulty")


def say_elbow(config: TrainConfig, found: Division) -> None:
    """Print the cost of every number of groups, if the elbow chose the number."""
    if config.groups == -1:
        costs = ", ".join(f"{n}: {cost:.4g}" for n, cost in enumerate(found.costs, 1))
        print(f"groups: the elbow is at {found.num_intervals}; scatter inside the groups by their number: {costs}")


def load_groups(run: RunDirectory) -> TimestepGroups:
    """The groups in groups.json.

    Raises:
        ValueError: there are none yet, or the file is not of this configuration.
    """
    path, config = run.path / "groups.json", run.config
    groups = TimestepGroups.load(path)
    if groups.num_timesteps != config.diffusion_steps or config.groups not in (-1, groups.num_groups):
        raise invalid("groups", str(path), "the groups that config.json describes; the file is of another run")
    return groups


def given_number(config: TrainConfig) -> int | None:
    """The number of groups; None if the elbow is to choose it."""
    return None if config.groups == -1 else config.groups


def build_groups(config: TrainConfig, *, report: bool = False) -> TimestepGroups | None:
    """The timestep groups; None for plain training, and for groups that need measurements of the base.

    Args:
        config: the configuration.
        report: print the elbow's costs, if it chooses the number.

    Raises:
        ValueError: the boundaries do not fit the number of timesteps.
    """
    if not config.groups or needs_base(config):
        return None
    if config.boundaries:
        bounds = comma_numbers("boundaries", config.boundaries, int)
        if bounds[-1] != config.diffusion_steps:
            raise invalid(
                "boundaries", config.boundaries, f"the last one to be --diffusion_steps, {config.diffusion_steps}"
            )
        return TimestepGroups(bounds)
    if config.grouping == "uniform":
        return TimestepGroups.uniform(config.diffusion_steps, config.groups)
    limits = comma_numbers("snr_range", config.snr_range, float)
    diffusion = build_diffusion(config)
    if config.grouping == "difficulty":
        probes = Probes.evenly(config.diffusion_steps, min(config.probes, config.diffusion_steps))
        levels = mean_over_probes(_clipped(diffusion.snr_db(), limits), probes)
        return difficulty_groups(config, probes, levels, report=report)
    return TimestepGroups.snr(diffusion, config.groups, clip_db=(limits[0], limits[1]) if limits else None)


def _clipped(values: np.ndarray, limits: list[float]) -> np.ndarray:
    return values.clip(limits[0], limits[1]) if limits else values
