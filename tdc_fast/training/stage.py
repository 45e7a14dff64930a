"""What a stage of training is: its length, its batches, its learning rate, and how its losses count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdc_fast.training.optimization import LearningRate


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The settings of one stage.

    Attributes:
        name: "base" or "experts".
        steps: number of steps; None for no limit.
        batch_size: images per step.
        learning_rate: by step.
        macs_per_sample: forward and backward MACs, per group or one entry for all timesteps.
        macs_before: MACs that the run had spent before the stage.
        rate_factors: each group's learning rate as a share of `learning_rate`; none for 1 everywhere.
        ema_lengths: each group's length of averaging as a multiple of that of the averages' rates; likewise.
        group_weights: weights (N,) of the groups' means in the logged mean loss; None for the plain mean.
        loss_scale: factor on the mean weighted loss.
        soft_boundaries: the sampler decides which expert trains on a timestep, as neighbours share some.
        teacher: a frozen denoiser whose predictions the model is also trained to give (--distillation_weight); None for
            none.
        origin: JSON values that identify what the stage started from; stored in checkpoints.
    """

    name: str
    steps: int | None
    batch_size: int
    learning_rate: LearningRate
    macs_per_sample: Sequence[int]
    macs_before: int = 0
    rate_factors: Sequence[float] = ()
    ema_lengths: Sequence[float] = ()
    group_weights: Sequence[float] | None = None
    loss_scale: float = 1.0
    soft_boundaries: bool = False
    teacher: nn.Module | None = None
    origin: dict[str, Any]
