"""How good a denoiser is: its loss on held-out images, its samples, and how far they are from real ones."""

from tdc_fast.evaluation.classifier import DigitsClassifier, train_classifier
from tdc_fast.evaluation.comparison import evaluate
from tdc_fast.evaluation.features import PrecomputedFeatures, RandomConvFeatures, extract
from tdc_fast.evaluation.frechet import DistanceSpread, Floor, frechet_distance, real_floors
from tdc_fast.evaluation.heldout import (
    Difference,
    HeldoutLosses,
    compare,
    heldout_losses,
    sampling_macs,
    timestep_grid,
)
from tdc_fast.evaluation.inception import InceptionFeatures, load_inception
from tdc_fast.evaluation.likelihood import bits_per_dimension
from tdc_fast.evaluation.manifolds import PrecisionRecall, precision_recall
from tdc_fast.evaluation.mmd import KernelDistance, kernel_distance
from tdc_fast.evaluation.moments import Moments, moments_distance
from tdc_fast.evaluation.options import EvaluateOptions
from tdc_fast.evaluation.samples import draw_samples, write_samples
from tdc_fast.evaluation.statistics import SetStatistics, gather_statistics

__all__ = [
    "Difference",
    "DigitsClassifier",
    "DistanceSpread",
    "EvaluateOptions",
    "Floor",
    "HeldoutLosses",
    "InceptionFeatures",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "PrecomputedFeatures",
    "RandomConvFeatures",
    "SetStatistics",
    "bits_per_dimension",
    "compare",
    "draw_samples",
    "evaluate",
    "extract",
    "frechet_distance",
    "gather_statistics",
    "heldout_losses",
    "kernel_distance",
    "load_inception",
    "moments_distance",
    "precision_recall",
    "real_floors",
    "sampling_macs",
    "timestep_grid",
    "train_classifier",
    "write_samples",
]
