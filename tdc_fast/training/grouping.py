"""The groups that only a trained base can tell: by similarity, by measured difficulty, or refined from given ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.calibration import Batch
from tdc_fast.grouping import Probes, TaskSimilarity, measure_similarity, probe_losses
from tdc_fast.grouping.difficulty import in_decibels
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.config import comma_numbers
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import _number, difficulty_groups, say_elbow


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


def _plot(run: RunDirectory, similarity: TaskSimilarity, groups: TimestepGroups) -> None:
    try:
        from tdc_fast.grouping.plot import similarity_plot

        (run.path / "similarity.png").write_bytes(similarity_plot(similarity, groups.boundaries))
    except ImportError:
        print("similarity.png is left out: it needs matplotlib (pip install 'tdc_fast[demo]')")
