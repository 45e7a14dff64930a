"""Phase "grouping": groups that depend on the trained base, measured and written to groups.json."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import islice

from torch import nn

from tdc_fast.data.dataset import Dataset
from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.calibration import Batch
from tdc_fast.distributed import world
from tdc_fast.grouping import Probes, measure_similarity, probe_losses
from tdc_fast.grouping.difficulty import in_decibels
from tdc_fast.grouping.plot import draw_similarity
from tdc_fast.nn.macs import MacCounter
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_diffusion, calibration_dtype
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import difficulty_groups, given_number, load_groups, say_elbow
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.training.phase import State, base_macs, build_base, open_stream, write_phase
from tdc_fast.training.random_state import derived_seed, seeded


def group_timesteps(run: RunDirectory, base_state: State, dataset: Dataset | None = None) -> TimestepGroups:
    """The groups of the run: those in groups.json, else measured on the base and written there.

    Args:
        run: the run.
        base_state: what `train_base` returned.
        dataset: images to measure on; None loads what the configuration names.
    """
    return world().from_first(lambda: _group_timesteps(run, base_state, dataset))


def _group_timesteps(run: RunDirectory, base_state: State, dataset: Dataset | None) -> TimestepGroups:
    config = run.config
    path = run.path / "groups.json"
    if path.is_file():
        return load_groups(run)
    base = build_base(run, base_state)
    macs = base_macs(run, base)
    with seeded(derived_seed(config.seed, "grouping")), MacCounter() as counter:
        with closing(open_stream(config, dataset, "grouping")) as stream:
            batches = list(islice(stream, config.calibration_batches))
        seed = derived_seed(config.seed, "probes") % 2**31
        groups = _measured_groups(run, base, build_diffusion(config), batches, seed)
    write_phase(run, macs, "grouping", macs=counter.macs)
    groups.save(path)  # after the cost: a run with groups.json has both
    return groups


def _measured_groups(
    run: RunDirectory, base: nn.Module, diffusion: Diffusion, batches: Sequence[Batch], seed: int
) -> TimestepGroups:
    """Measure the base and divide its timesteps as the run's configuration says.

    The measurement is written beside groups.json: similarity.json (and similarity.png if matplotlib is installed), or
    difficulty.json.
    """
    config = run.config
    probes, dtype = min(config.probes, diffusion.num_timesteps), calibration_dtype(config)
    if config.grouping == "similarity" or config.boundaries:
        similarity = measure_similarity(base, diffusion, batches, num_probes=probes, seed=seed, dtype=dtype)
        similarity.save(run.path / "similarity.json")
        if config.boundaries:
            groups = similarity.refine(comma_numbers("boundaries", config.boundaries, int), config.refine)
        else:
            found = similarity.divide(given_number(config), max_groups=config.max_groups)
            say_elbow(config, found)
            groups = similarity.probes.groups(found.cuts, "similarity")
        draw_similarity(run.path, similarity, groups.boundaries)
        return groups
    intervals = Probes.evenly(diffusion.num_timesteps, probes)
    losses = probe_losses(base, intervals, diffusion, batches, seed=seed, dtype=dtype)
    run.write("difficulty.json", {"edges": list(intervals.edges), "loss": [float(loss) for loss in losses]})
    return difficulty_groups(config, intervals, in_decibels(losses), report=True)
