"""Training: data, stage loops, EMA, checkpoints and telemetry."""

from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.loading import Run, load_run
from tdc_fast.training.stages import prune_base, train_base, train_experts

__all__ = ["Run", "RunDirectory", "TrainConfig", "load_run", "prune_base", "train_base", "train_experts"]
