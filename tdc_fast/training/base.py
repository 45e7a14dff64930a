"""Stage 1: one denoiser for all timesteps, trained or taken from elsewhere."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from torch import nn

from tdc_fast.data.dataset import Dataset
from tdc_fast.diffusion.timestep_samplers import create_timestep_sampler
from tdc_fast.distributed import GradientSum, world
from tdc_fast.runs.build import build_device, build_diffusion, build_unet, place
from tdc_fast.runs.checkpoint import ema_file, find_problem, finished_steps, save_checkpoint, state_file
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import build_groups
from tdc_fast.runs.weights import cpu_state, find_base_file, load_weights, read_state
from tdc_fast.training import cost
from tdc_fast.training.loop import StageLoop
from tdc_fast.training.optimization import LearningRate
from tdc_fast.training.phase import State, build_base, image_shape, num_classes, open_stream, write_phase
from tdc_fast.training.portion import Portion, Shard
from tdc_fast.training.preview import write_preview
from tdc_fast.training.random_state import derived_seed, seeded
from tdc_fast.training.resume_checkpoint import continue_from
from tdc_fast.training.stage import Stage


def train_base(run: RunDirectory, dataset: Dataset | None = None) -> State:
    """Stage 1: train one denoiser for all timesteps, or take the weights that `--base` names.

    Args:
        run: continues from its checkpoint of stage 1, if there is one.
        dataset: what to train on; None loads what the configuration names.

    Returns:
        The state dict of the first moving average (or of the given base), on the CPU.
    """
    config = run.config
    diffusion = build_diffusion(config)
    with seeded(derived_seed(config.seed, "base")):
        model = place(build_unet(config, run.in_channels), build_device(config))
        macs = cost.training_macs(model, diffusion, image_shape(run), None, num_classes(config))
        if config.base:
            return world().from_first(lambda: _take_base(run, model, macs))
        stage = Stage(
            name="base",
            steps=cost.stage1_steps(config),
            batch_size=config.batch_size,
            learning_rate=LearningRate(config.lr, config.warmup_steps, config.lr_anneal_start, config.lr_anneal_steps),
            macs_per_sample=macs.training,
            origin={},
        )
        sampler = create_timestep_sampler(config.schedule_sampler, diffusion.num_timesteps)
        with closing(open_stream(config, dataset, "base", device=build_device(config))) as stream:
            loop = StageLoop(run, stage, model, diffusion, stream, sampler, build_groups(config), _shard(stage, model))
            if not loop.resume() and config.resume_checkpoint:
                continue_from(Path(config.resume_checkpoint), loop)
            loop.train()
    write_phase(run, macs, "stage1", steps=loop.step, samples=loop.samples, macs=loop.macs)
    state = world().from_first(lambda: cpu_state(loop.averages.state_dict(config.ema_rates[0])))
    if config.preview and world().first:
        write_preview(run, "base", loop.step, build_base(run, state), diffusion)
    return state


def _shard(stage: Stage, model: nn.Module) -> Shard | None:
    """This process's part of every batch; None for one process alone."""
    this, parameters = world(), list(model.parameters())
    if this.alone:
        return None
    group = this.team(range(this.size), parameters[0].device)
    portion = Portion(stage.batch_size, this.rank, this.size)
    return Shard(portion, this, parameters[0].device, GradientSum(parameters, group, this), group)


def _take_base(run: RunDirectory, model: nn.Module, macs: cost.SampleMacs) -> State:
    """The weights that `--base` names, copied into the run so that it does not need that file later."""
    directory, rate = run.stage_directory("base"), run.config.ema_rates[0]
    steps = finished_steps(directory)
    if steps:
        problem = find_problem(directory, steps[-1], {"stage": "base", "identity": run.identity})
        if problem:
            raise ValueError(f"resume: {problem}; remove {directory} to load {run.config.base} again")
        return read_state(directory / ema_file(rate, steps[-1]), model.state_dict())
    path = find_base_file(run.config.base)
    source = load_weights(path, run.config, model) or {}
    step, spent = source.get("step", 0), source.get("macs")
    state = cpu_state(model.state_dict())
    write_phase(run, macs, "stage1", taken_from=str(path), steps=source.get("step"), macs=spent)
    contents = {ema_file(rate, step): state, state_file(step): {"step": step}}
    save_checkpoint(directory, step, contents, run.description("base", macs=spent, taken_from=str(path)))
    return state
