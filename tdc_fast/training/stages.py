"""The phases of TDC training, each callable alone: base, pruning, experts.

Every phase continues what the run directory already holds, so calling them again on the same directory resumes the run.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.timestep_samplers import create_timestep_sampler
from tdc_fast.errors import invalid
from tdc_fast.grouping import probe_losses
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.macs import MacCounter
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.width_plan import WidthPlan, base_hash
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_data, build_device, build_diffusion, build_unet, place
from tdc_fast.runs.checkpoint import (
    ema_file,
    find_problem,
    finished_steps,
    load_verified,
    save_checkpoint,
    state_file,
)
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import build_groups, load_groups
from tdc_fast.runs.weights import cpu_state, find_base_file, load_base_file
from tdc_fast.training import cost
from tdc_fast.training.grouping import measured_groups
from tdc_fast.training.loop import Stage, StageLoop
from tdc_fast.training.optimization import LearningRate
from tdc_fast.training.preview import write_preview
from tdc_fast.training.random_state import derived_seed, seeded
from tdc_fast.training.resume_checkpoint import continue_from

if TYPE_CHECKING:
    from tdc_fast.pruning.search import Pruning

State = dict[str, Tensor]


def train_base(run: RunDirectory, dataset: Any = None) -> State:
    """Stage 1: one denoiser for all timesteps; or the weights that ``--base`` names.

    Args:
        dataset: what to train on; None loads what the configuration names.

    Returns:
        The state dict of the first moving average (or of the given base), on the CPU.
    """
    from tdc_fast.data.stream import BatchStream

    config = run.config
    groups, diffusion, device = build_groups(config), build_diffusion(config), build_device(config)
    with seeded(derived_seed(config.seed, "base")):
        model = place(build_unet(config, run.in_channels), device)
        macs = cost.measure(model, diffusion, _shape(run), None, _classes(config))
        if config.base:
            return _take_base(run, model, macs)
        steps = cost.stage1_steps(config)
        stage = Stage(
            name="base",
            steps=steps,
            batch_size=config.batch_size,
            learning_rate=LearningRate(config.lr, config.warmup_steps, config.lr_anneal_start, config.lr_anneal_steps),
            macs_per_sample=macs.training,
            origin={},
        )
        stream = BatchStream(
            dataset or build_data(config), config.batch_size, derived_seed(config.seed, "data", "base")
        )
        sampler = create_timestep_sampler(config.schedule_sampler, diffusion.num_timesteps)
        loop = StageLoop(run, stage, model, diffusion, stream, sampler, groups)
        if not loop.resume() and config.resume_checkpoint:
            continue_from(Path(config.resume_checkpoint), loop)
        new = not loop.finished
        try:
            loop.train()
        finally:
            stream.close()
    _write_phase(run, macs, None, "stage1", steps=loop.step, samples=loop.step * config.batch_size, macs=loop.macs)
    state = cpu_state(loop.averages.state_dict(config.ema_rates[0]))
    if new and config.preview:
        write_preview(run, "base", loop.step, build_base(run, state), diffusion)
    return state


def group_timesteps(run: RunDirectory, base_state: State, dataset: Any = None) -> TimestepGroups:
    """The groups of the run: those that groups.json holds, else measured on the base and written there."""
    from tdc_fast.data.stream import BatchStream

    config = run.config
    path = run.path / "groups.json"
    if path.is_file():
        return load_groups(run)
    base = build_base(run, base_state)
    macs = _base_macs(run, base)
    with seeded(derived_seed(config.seed, "grouping")), MacCounter() as counter:
        stream = BatchStream(
            dataset or build_data(config), config.batch_size, derived_seed(config.seed, "data", "grouping")
        )
        batches = list(islice(stream, config.calibration_batches))
        stream.close()
        seed = derived_seed(config.seed, "probes") % 2**31
        groups = measured_groups(run, base, build_diffusion(config), batches, seed)
    _write_phase(run, macs, None, "grouping", macs=counter.macs)
    groups.save(path)  # after the cost: a run with groups.json has both
    return groups


def prune_base(run: RunDirectory, base_state: State, dataset: Any = None) -> WidthPlan | None:
    """Choose every expert's widths within its budget and write widths.json; None when every expert keeps all of them.

    A plan that widths.json already holds is taken, once it is checked to be of this base.
    """
    from tdc_fast.training.search import prunes

    base = build_base(run, base_state)
    path = run.path / "widths.json"
    if path.is_file():
        plan = WidthPlan.load(path)
        plan.check(base.pruning_units(), base=base_hash(base), boundaries=_groups(run).boundaries)
        return plan
    if not prunes(run.config):
        _write_phase(run, _base_macs(run, base), None, "pruning", macs=0)
        return None
    return search_widths(run, run.config, base, dataset).plan


def search_widths(run: RunDirectory, config: TrainConfig, base: UNet, dataset: Any = None) -> Pruning:
    """Search the experts' widths and write widths.json, whatever it held.

    Args:
        config: the run's own, or with other options of the search.
        base: as ``build_base`` gives it.
    """
    from tdc_fast.data.stream import BatchStream
    from tdc_fast.training.search import search_run

    groups = _groups(run)
    macs = _base_macs(run, base)
    with seeded(derived_seed(config.seed, "pruning")):
        stream = BatchStream(
            dataset or build_data(config), config.batch_size, derived_seed(config.seed, "data", "pruning")
        )
        difficulty, spent = _difficulty(run, base, groups, dataset)
        try:
            found = search_run(run, config, base, groups, stream, difficulty)
        finally:
            stream.close()
    searched = {name: getattr(config, name) for name in ("agent", "rounds", "candidates", "memory")}
    _write_phase(run, macs, None, "pruning", macs=found.calibration_macs + spent, **searched)
    found.plan.save(run.path / "widths.json")  # after the cost: a run with widths.json has both
    return found


def train_experts(
    run: RunDirectory, base_state: State, widths: WidthPlan | None = None, dataset: Any = None
) -> nn.Module:
    """Stage 2: every expert starts from the base's averaged weights and trains on its timesteps, in one routed batch.

    Returns:
        The RoutedModel with the first moving average as its weights, on the training device.
    """
    from tdc_fast.data.stream import BatchStream

    config = run.config
    groups, diffusion, device = _groups(run), build_diffusion(config), build_device(config)
    with seeded(derived_seed(config.seed, "experts")):
        base = build_base(run, base_state)
        digest = base_hash(base)
        base_macs = _base_macs(run, base)
        model = pack_experts(base.train(), groups, widths).to(device)
        macs = cost.measure(model, diffusion, _shape(run), groups, _classes(config))
        spent = _spent(run, ("stage1", "grouping", "pruning"), config, base_macs)
        steps = cost.stage2_steps(config, base_macs, macs, spent)
        shares = cost.stage2_shares(config, groups.num_groups)
        stage = Stage(
            name="experts",
            steps=steps,
            batch_size=config.stage2_batch or config.batch_size,
            learning_rate=LearningRate(
                config.stage2_lr or config.lr, config.warmup_steps, anneal_end=steps if config.stage2_anneal else 0
            ),
            macs_per_sample=macs.training,
            macs_before=spent,
            num_experts=groups.num_groups,
            group_weights=[size / groups.num_timesteps for size in groups.sizes],
            # Weights "per_group" give each group 1/N of the mean: times N, an expert's gradient is that of its own
            # mean loss.
            loss_scale=float(groups.num_groups),
            soft_boundaries=config.overlap > 0,
            origin={"base_hash": digest, "widths_hash": _plan_hash(widths), "boundaries": list(groups.boundaries)},
        )
        stream = BatchStream(
            dataset or build_data(config), stage.batch_size, derived_seed(config.seed, "data", "experts")
        )
        sampler = create_timestep_sampler(
            "stratified",
            diffusion.num_timesteps,
            groups=groups,
            shares=shares,
            weighting="per_group",
            overlap=config.overlap,
        )
        loop = StageLoop(run, stage, model, diffusion, stream, sampler, groups)
        loop.resume()
        new = not loop.finished
        try:
            loop.train()
        finally:
            stream.close()
    _write_phase(run, base_macs, macs, "stage2", steps=loop.step, samples=loop.step * stage.batch_size, macs=loop.macs)
    model.load_state_dict(loop.averages.state_dict(config.ema_rates[0]))
    model.eval()
    if new and config.preview:
        write_preview(run, "experts", loop.step, model, diffusion)
    return model


def build_base(run: RunDirectory, state: State) -> UNet:
    """The dense base with the given weights, in evaluation mode, on the run's device."""
    with torch.random.fork_rng():
        model = build_unet(run.config, run.in_channels)
    model.load_state_dict(state)
    placed: UNet = place(model, build_device(run.config)).eval()
    return placed


def _base_macs(run: RunDirectory, base: UNet) -> cost.SampleMacs:
    """What a sample costs in the base, from macs.json where stage 1 has entered it."""
    known = run.read("macs.json")
    if known is None:
        return cost.measure(base, build_diffusion(run.config), _shape(run), None, _classes(run.config))
    per_sample = known["per_sample"]
    return cost.SampleMacs((per_sample["forward"]["base"],), (per_sample["forward_backward"]["base"],))


def _take_base(run: RunDirectory, model: nn.Module, macs: cost.SampleMacs) -> State:
    """The weights that ``--base`` names, kept as the run's own base so that the run is complete without that file."""
    directory, rate = run.stage_directory("base"), run.config.ema_rates[0]
    steps = finished_steps(directory)
    if steps:
        problem = find_problem(directory, steps[-1], {"stage": "base", "identity": run.identity})
        if problem:
            raise ValueError(f"resume: {problem}; remove {directory} to take {run.config.base} anew")
        state: State = load_verified(directory / ema_file(rate, steps[-1]))
        return state
    path = find_base_file(run.config.base)
    source = load_base_file(path, run.config, model) or {}
    step, spent = source.get("step", 0), source.get("macs")
    state = cpu_state(model.state_dict())
    _write_phase(run, macs, None, "stage1", taken_from=str(path), steps=source.get("step"), macs=spent)
    contents = {ema_file(rate, step): state, state_file(step): {"step": step}}
    save_checkpoint(directory, step, contents, run.description("base", macs=spent, taken_from=str(path)))
    return state


def _spent(run: RunDirectory, phases: tuple[str, ...], config: TrainConfig, base: cost.SampleMacs) -> int:
    """MACs of earlier phases; a base of unknown cost counts as --stage1_share of the baseline."""
    known = (run.read("macs.json") or {}).get("phases", {})
    total = 0
    for phase in phases:
        macs = known.get(phase, {}).get("macs", 0)
        total += round(config.stage1_share * cost.baseline_macs(config, base)) if macs is None else macs
    return total


def _write_phase(
    run: RunDirectory, base: cost.SampleMacs, experts: cost.SampleMacs | None, phase: str, **facts: Any
) -> None:
    """Enter one phase into macs.json."""
    phases = (run.read("macs.json") or {}).get("phases", {})
    run.write("macs.json", cost.summary(run.config, base, experts, {**phases, phase: facts}))


def _difficulty(run: RunDirectory, base: UNet, groups: TimestepGroups, dataset: Any) -> tuple[str | list[float], int]:
    """What ranks the groups: the name of an order by SNR, or each group's measured loss; and the MACs it took."""
    from tdc_fast.data.stream import BatchStream

    config = run.config
    if "loss" not in config.difficulty:
        return config.difficulty, 0
    stream = BatchStream(
        dataset or build_data(config), config.batch_size, derived_seed(config.seed, "data", "difficulty")
    )
    with MacCounter() as counter:
        losses = probe_losses(
            base,
            groups,
            build_diffusion(config),
            stream,
            max_batches=config.calibration_batches,
            seed=derived_seed(config.seed, "difficulty") % 2**31,
        )
    stream.close()
    sign = -1 if config.difficulty.endswith("reversed") else 1
    return [sign * float(loss) for loss in losses], counter.macs


def _groups(run: RunDirectory) -> TimestepGroups:
    if not run.config.groups:
        raise invalid("groups", run.config.groups, "at least 1 for a stage of experts")
    return load_groups(run)


def _shape(run: RunDirectory) -> tuple[int, int, int]:
    return (run.in_channels, run.config.image_size, run.config.image_size)


def _classes(config: TrainConfig) -> int | None:
    return config.num_classes if config.class_cond else None


def _plan_hash(widths: WidthPlan | None) -> str | None:
    return hashlib.sha256(json.dumps(widths.to_json(), sort_keys=True).encode()).hexdigest() if widths else None
