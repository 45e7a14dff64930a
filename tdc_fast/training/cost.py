"""What training costs, in multiply-accumulates (MACs) that torch's FlopCounterMode counted.

A convolution's or product's MACs are half its FLOPs. The cost of a sample does not depend on its batch, so it is
measured once per distinct network (the base; each expert) on one sample, forward and backward, loss included, and
multiplied by the samples that the network has really seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tdc_fast.diffusion import Diffusion
from tdc_fast.errors import invalid
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.config import TrainConfig, comma_numbers


@dataclass(frozen=True)
class SampleMacs:
    """MACs of one sample, one entry per group (a single entry for a base that serves all timesteps)."""

    forward: tuple[int, ...]
    training: tuple[int, ...]
    """Forward and backward together."""


def measure(
    model: nn.Module,
    diffusion: Diffusion,
    shape: tuple[int, ...],
    groups: TimestepGroups | None,
    num_classes: int | None,
) -> SampleMacs:
    """Count one sample of ``shape`` (C, H, W) per group.

    Parameters' gradients are None afterwards; random numbers are untouched.
    """
    device = next(model.parameters()).device
    starts = [start for start, _ in groups] if groups else [0]
    forward, training = [], []
    with torch.random.fork_rng():
        for start in starts:
            x = torch.zeros(1, *shape, device=device).contiguous(memory_format=torch.channels_last)
            t = torch.tensor([start], device=device)
            labels = {"y": torch.zeros(1, dtype=torch.int64, device=device)} if num_classes else {}
            forward.append(measure_macs(model, x, t, **labels))
            with MacCounter() as counter:
                diffusion.training_losses(model, x, t, model_kwargs=labels)["loss"].sum().backward()
            training.append(counter.macs)
    for parameter in model.parameters():
        parameter.grad = None
    return SampleMacs(tuple(forward), tuple(training))


def stage1_steps(config: TrainConfig) -> int | None:
    """Number of steps of stage 1; None trains without end."""
    if config.groups:
        return config.stage1_steps or round(config.stage1_share * config.baseline_steps) or config.lr_anneal_steps
    return config.stage1_steps or config.lr_anneal_steps or None


def stage2_shares(config: TrainConfig, num_groups: int) -> list[float]:
    """Each group's share of the stage-2 batches, summing to 1."""
    weights = comma_numbers("stage2_shares", config.stage2_shares, float) or [1.0] * num_groups
    return [weight / sum(weights) for weight in weights]


def stage2_steps(config: TrainConfig, base: SampleMacs, experts: SampleMacs, spent: int) -> int:
    """Number of steps of stage 2: as given, or as many as the rest of the budget pays for.

    Args:
        spent: MACs of stage 1 and pruning.

    Raises:
        ValueError: stage 1 and pruning have used the budget up.
    """
    if config.stage2_steps:
        return config.stage2_steps
    budget = config.total_share * baseline_macs(config, base)
    shares = stage2_shares(config, len(experts.training))
    per_sample = sum(share * macs for share, macs in zip(shares, experts.training, strict=True))
    steps = int((budget - spent) / (per_sample * (config.stage2_batch or config.batch_size)))
    if steps < 1:
        raise invalid(
            "total_share",
            config.total_share,
            f"more than what stage 1 and pruning cost, {spent / baseline_macs(config, base):.3f} of the baseline",
        )
    return steps


def baseline_macs(config: TrainConfig, base: SampleMacs) -> int:
    """MACs of the uniform baseline: the base trained for --baseline_steps."""
    return config.baseline_steps * config.batch_size * base.training[0]


def summary(
    config: TrainConfig,
    base: SampleMacs,
    experts: SampleMacs | None = None,
    phases: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of macs.json: cost per sample, per phase, in total, and as a share of the baseline's."""
    phases = phases or {}
    total = sum(phase["macs"] or 0 for phase in phases.values())
    baseline = baseline_macs(config, base)
    return {
        "unit": "multiply-accumulates (half of the FLOPs that torch's FlopCounterMode counts)",
        "method": "measured on one sample per network, times samples; pruning is counted while it runs",
        "per_sample": {
            "forward": {"base": base.forward[0], "experts": list(experts.forward) if experts else None},
            "forward_backward": {"base": base.training[0], "experts": list(experts.training) if experts else None},
        },
        "phases": phases,
        "total": total,
        "baseline": {"steps": config.baseline_steps, "macs": baseline} if baseline else None,
        "total_over_baseline": total / baseline if baseline else None,
    }
