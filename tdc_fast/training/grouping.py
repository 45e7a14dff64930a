"""The groups that only a trained base can tell: by similarity, by measured difficulty, or refined from given ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from tdc_fast.diffusion import Diffusion
from tdc_fast.errors import invalid
from tdc_fast.grouping import Division, Probes, TaskSimilarity, divide, measure_similarity, probe_losses
from tdc_fast.grouping.difficulty import in_decibels
from tdc_fast.grouping.intervals import scatter_of_values
from tdc_fast.pruning.importance import Batch
from tdc_fast.routing import TimestepGroups
from tdc_fast.training.config import TrainConfig, comma_numbers
from tdc_fast.training.run import RunDirectory


def needs_base(config: TrainConfig) -> bool:
    """Whether the groups depend on the base's weights, and are not known before stage 1 has ended."""
    measured = config.grouping == "similarity" or (config.grouping == "difficulty" and "loss" in config.difficulty)
    return config.groups != 0 and (config.refine > 0 if config.boundaries else measured)


def measured_groups(
    run: RunDirectory, base: nn.Module, diffusion: Diffusion, batches: Sequence[Batch], seed: int
) -> TimestepGroups:
    """Measure the base and divide its timesteps as the run's configuration says.

    Writes what was measured beside groups.json: similarity.json (and similarity.png where matplotlib is installed), or
    difficulty.json.
    """
    config = run.config
    probes = min(config.probes, diffusion.num_timesteps)
    if config.grouping == "similarity" or config.boundaries:
        similarity = measure_similarity(base, diffusion, batches, num_probes=probes, seed=seed)
        similarity.save(run.path / "similarity.json")
        if config.boundaries:
            groups = similarity.refine(comma_numbers("boundaries", config.boundaries, int), config.refine)
        else:
            found = similarity.divide(_number(config), max_groups=config.max_groups)
            say_elbow(config, found)
            groups = similarity.probes.groups(found.cuts, "similarity")
        _plot(run, similarity, groups)
        return groups
    intervals = Probes.evenly(diffusion.num_timesteps, probes)
    losses = probe_losses(base, intervals, diffusion, batches, seed=seed)
    run.write("difficulty.json", {"edges": list(intervals.edges), "loss": [float(loss) for loss in losses]})
    return difficulty_groups(config, intervals, in_decibels(losses), report=True)


def difficulty_groups(
    config: TrainConfig, probes: Probes, levels: np.ndarray, *, report: bool = False
) -> TimestepGroups:
    """Groups of whole probes whose levels of difficulty (P,), in decibels, scatter least inside the groups.

    report: print what the elbow weighed, where it chose.
    """
    found = divide(scatter_of_values(levels, probes.sizes), _number(config), max_intervals=config.max_groups)
    if report:
        say_elbow(config, found)
    return probes.groups(found.cuts, "difficulty")


def say_elbow(config: TrainConfig, found: Division) -> None:
    """Report the cost of every number of groups that was weighed, where the number was left open."""
    if config.groups == -1:
        costs = ", ".join(f"{n}: {cost:.4g}" for n, cost in enumerate(found.costs, 1))
        print(f"groups: the elbow is at {found.num_intervals}; scatter inside the groups by their number: {costs}")


def load_groups(run: RunDirectory) -> TimestepGroups:
    """The groups in groups.json. ValueError where there are none yet, or the file is not of this configuration."""
    path, config = run.path / "groups.json", run.config
    groups = TimestepGroups.load(path)
    if groups.num_timesteps != config.diffusion_steps or config.groups not in (-1, groups.num_groups):
        raise invalid("groups", str(path), "the groups that config.json describes; the file is of another run")
    return groups


def _number(config: TrainConfig) -> int | None:
    return None if config.groups == -1 else config.groups


def _plot(run: RunDirectory, similarity: TaskSimilarity, groups: TimestepGroups) -> None:
    try:
        from tdc_fast.report.grouping_plot import similarity_plot

        (run.path / "similarity.png").write_bytes(similarity_plot(similarity, groups.boundaries))
    except ImportError:
        print("similarity.png is left out: it needs matplotlib (pip install 'tdc_fast[demo]')")
