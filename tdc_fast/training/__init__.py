"""Training: a run's phases (base, grouping, pruning, experts) and the loop that they share.

Every phase continues what the run directory already holds, so calling it again on the same directory resumes the run.
"""

from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.loading import Run, load_run
from tdc_fast.training.base import train_base
from tdc_fast.training.experts import train_experts
from tdc_fast.training.pruning import prune_base

__all__ = ["Run", "RunDirectory", "TrainConfig", "load_run", "prune_base", "train_base", "train_experts"]
