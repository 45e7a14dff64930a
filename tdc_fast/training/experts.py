"""Stage 2: all experts, each on its own timesteps, in one routed batch."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import nn

from tdc_fast.data.dataset import Dataset
from tdc_fast.diffusion.loss_slope import LossSlopeSampler
from tdc_fast.diffusion.timestep_samplers import TimestepSampler, create_timestep_sampler
from tdc_fast.distributed import world
from tdc_fast.nn.inference import for_inference
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.width_plan import WidthPlan, base_hash
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_device, build_diffusion
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.runs.widths import plan_hash
from tdc_fast.training import cost
from tdc_fast.training.expert_parallel import adapt_sampler, take_own_experts
from tdc_fast.training.loop import StageLoop
from tdc_fast.training.optimization import LearningRate
from tdc_fast.training.phase import (
    State,
    base_macs,
    build_base,
    groups_of,
    image_shape,
    num_classes,
    open_stream,
    spent_macs,
    write_phase,
)
from tdc_fast.training.preview import write_preview
from tdc_fast.training.random_state import derived_seed, seeded
from tdc_fast.training.stage import Stage


def train_experts(
    run: RunDirectory, base_state: State, widths: WidthPlan | None = None, dataset: Dataset | None = None
) -> nn.Module:
    """Stage 2: train every expert on its timesteps, starting from the base's averaged weights.

    Args:
        run: continues from its checkpoint of stage 2, if there is one.
        base_state: what `train_base` returned.
        widths: what `prune_base` returned; None leaves every expert whole.
        dataset: what to train on; None loads what the configuration names.

    Returns:
        The RoutedModel with the first moving average as its weights, on the training device. Of several processes the
        first has all experts, and each other one its own.
    """
    config = run.config
    groups, diffusion = groups_of(run), build_diffusion(config)
    with seeded(derived_seed(config.seed, "experts")):
        base = build_base(run, base_state)
        origin = {
            "base_hash": base_hash(base),
            "widths_hash": plan_hash(widths),
            "boundaries": list(groups.boundaries),
        }
        of_base = base_macs(run, base)
        device = build_device(config)
        model = pack_experts(base.train(), groups, widths, shared_layers=config.shared_layers).to(device)
        of_experts = cost.training_macs(model, diffusion, image_shape(run), groups, num_classes(config))
        teacher = None
        if config.distillation_weight:
            teacher = _teacher(run, base_state)
            of_experts = of_experts.taught_by(of_base)
        spent = spent_macs(run, of_base)
        steps = world().from_first(lambda: cost.stage2_steps(config, of_base, of_experts, spent))
        stage = Stage(
            name="experts",
            steps=steps,
            batch_size=config.stage2_batch or config.batch_size,
            learning_rate=_learning_rate(config, steps),
            macs_per_sample=of_experts.training,
            macs_before=spent,
            rate_factors=comma_numbers("stage2_lr_factors", config.stage2_lr_factors, float),
            ema_lengths=comma_numbers("stage2_ema_factors", config.stage2_ema_factors, float),
            group_weights=[size / groups.num_timesteps for size in groups.sizes],
            # With weights "per_group" each group has 1/N of the mean loss. Times N, an expert's gradient is that of the
            # mean loss over its own samples; weights that groups share get the mean of their groups' gradients.
            loss_scale=float(groups.num_groups),
            soft_boundaries=config.overlap > 0,
            teacher=teacher,
            origin=origin,
        )
        sampler = _sampler(config, groups, steps)
        own = None if world().alone else take_own_experts(config, base, model, widths, stage)
        if own is not None:
            model, stage = own.model, own.stage
            adapt_sampler(sampler)
        with closing(open_stream(config, dataset, "experts", stage.batch_size, device)) as stream:
            loop = StageLoop(run, stage, model, diffusion, stream, sampler, groups, *(own.place if own else ()))
            loop.resume()
            loop.train()
    facts = {"steps": loop.step, "samples": loop.samples, "macs": loop.macs}
    write_phase(run, of_base, "stage2", experts=of_experts, **facts)
    rate = config.ema_rates[0]
    if own is None:
        model.load_state_dict(loop.averages.state_dict(rate))
    else:
        model = own.with_all_experts(loop.averages, rate)
    model.eval()
    if world().first:
        write_preview(run, "experts", loop.step, model, diffusion)
    return model


def _teacher(run: RunDirectory, base_state: State) -> nn.Module:
    """A base with the weights that the experts start from, frozen, in the precision of training."""
    dtype = torch.bfloat16 if run.config.mixed_precision else torch.float32
    base = build_base(run, base_state)  # its own, as its weights are cast
    return for_inference(base.requires_grad_(False), dtype)


def _learning_rate(config: TrainConfig, steps: int) -> LearningRate:
    end = steps if config.stage2_anneal else 0
    return LearningRate(config.stage2_lr or config.lr, config.warmup_steps, anneal_end=end)


def _sampler(config: TrainConfig, groups: TimestepGroups, steps: int) -> TimestepSampler:
    """Timesteps stratified over the groups."""
    shares = cost.stage2_shares(config, groups.num_groups)
    if config.stage2_slope_windows:
        return LossSlopeSampler(groups, shares, window=max(1, steps // config.stage2_slope_windows))
    return create_timestep_sampler(
        "stratified",
        groups.num_timesteps,
        groups=groups,
        shares=shares,
        weighting="per_group",
        overlap=config.overlap,
    )
