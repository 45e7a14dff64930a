"""The cost of training in multiply-accumulates (MACs), counted by torch's FlopCounterMode.

MACs are half of the FLOPs of convolutions and matrix products. The cost of a sample does not depend on its batch, so it
is measured once per network (the base; each expert) on one sample, forward and backward, loss included, and multiplied
by the number of samples that the network was trained on.
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
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.limits import comma_numbers


@dataclass(frozen=True)
class SampleMacs:
    """MACs of one sample, one entry per group, or a single entry for a base.

    Attributes:
        forward: of the forward pass.
        training: of forward and backward pass together, with the teacher's forward pass where there is a teacher.
    """

    forward: tuple[int, ...]
    training: tuple[int, ...]

    def taught_by(self, base: SampleMacs) -> SampleMacs:
        """The cost where every sample in training also takes a forward pass of the base."""
        return SampleMacs(self.forward, tuple(macs + base.forward[0] for macs in self.training))


def training_macs(
    model: nn.Module,
    diffusion: Diffusion,
    shape: tuple[int, ...],
    groups: TimestepGroups | None,
    num_classes: int | None,
) -> SampleMacs:
    """Count one sample per group.

    Gradients of the parameters are None afterwards; random generators are left unchanged.

    Args:
        model: the base, or all experts as one routed model.
        diffusion: the process that it is trained with.
        shape: (C, H, W) of the images.
        groups: the groups of the experts; None for a base.
        num_classes: classes of a conditional model, else None.
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
    """Number of steps of stage 1; None for no limit."""
    if config.groups:
        return config.stage1_steps or round(config.stage1_share * config.baseline_steps) or config.lr_anneal_steps
    return config.stage1_steps or config.lr_anneal_steps or None


def stage2_shares(config: TrainConfig, num_groups: int) -> list[float]:
    """Each group's share of the batches of stage 2; they sum to 1."""
    weights = comma_numbers("stage2_shares", config.stage2_shares, float) or [1.0] * num_groups
    return [weight / sum(weights) for weight in weights]


def stage2_steps(config: TrainConfig, base: SampleMacs, experts: SampleMacs, spent: int) -> int:
    """Number of steps of stage 2: as given, or as many as fit into the rest of the budget.

    Args:
        config: steps, or the budget.
        base: MACs per sample of the base.
        experts: MACs per sample of the experts.
        spent: MACs of the phases before.

    Raises:
        ValueError: nothing of the budget is left.
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
    """The content of macs.json: cost per sample, per phase, in total, and relative to the baseline.

    Args:
        config: describes the baseline.
        base: MACs per sample of the base.
        experts: MACs per sample of the experts, once they exist.
        phases: per phase JSON values, `macs` among them.
    """
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
