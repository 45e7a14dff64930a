"""Dividing timesteps into groups: by similar gradients, by similar difficulty, or by hand and refined."""

from tdc_fast.grouping.difficulty import probe_losses
from tdc_fast.grouping.intervals import Division, divide, elbow
from tdc_fast.grouping.probes import Probes
from tdc_fast.grouping.similarity import TaskSimilarity, measure_similarity

__all__ = ["Division", "Probes", "TaskSimilarity", "divide", "elbow", "measure_similarity", "probe_losses"]
