"""Fréchet distance between two sets of images, in a feature space that the caller names.

The number compares only with others of the same feature space, reference set and number of samples. It is not the
published "FID", which is defined by one particular Inception network: nothing here uses that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid, require
from tdc_fast.evaluation.features import PrecomputedFeatures


def frechet_distance(a: Tensor, b: Tensor, extractor: nn.Module, *, batch_size: int = 512) -> float:
    """||mean_a - mean_b||^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) of the features of two image sets.

    a (M, C, H, W) and b (K, C, H, W) are what `extractor` takes (uint8 images for the extractors of this package); it
    returns (M, F) and has an integer `num_features` = F. torchmetrics does the arithmetic, in float64. Raises
    ValueError if a set has fewer than two members.
    """
    image_metrics = require("torchmetrics.image.fid", "demo")
    for name, images in (("a", a), ("b", b)):
        if len(images) < 2:
            raise invalid(name, f"{len(images)} images", "at least 2, the fewest that have a covariance")
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "at least 1")
    metric = image_metrics.FrechetInceptionDistance(feature=_Double(extractor), normalize=False)
    for images, real in ((a, True), (b, False)):
        for batch in images.split(batch_size):
            metric.update(batch, real=real)
    # Rounding may leave a value just below zero for equal sets; the distance itself never is.
    return max(0.0, float(metric.compute()))


class _Double(nn.Module):
    """torchmetrics returns the dtype that the features had: float64 features keep the result in float64."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_features = int(extractor.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.extractor(images).double()


@dataclass(frozen=True)
class Floor:
    """The distance that two sets of *real* images have, for want of infinite data.

    kind "bootstrap": `n` images drawn with replacement from the reference against the whole reference; what a perfect
    generator of the reference's own distribution would reach. kind "halves": two random halves of `n` images each,
    which share nothing. `values` holds one distance for each repetition.
    """

    kind: str
    n: int
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "n": self.n,
            "mean": float(np.mean(self.values)),
            "min": min(self.values),
            "max": max(self.values),
            "repetitions": len(self.values),
        }


def real_floors(features: Tensor, *, bootstrap_n: int, repetitions: int = 8, seed: int = 0) -> tuple[Floor, Floor]:
    """Both floors of a reference set, given its features (M, F)."""
    if len(features) < 4:
        raise invalid("features", f"{len(features)} images", "a reference of at least 4 images")
    generator = torch.Generator().manual_seed(seed)
    identity = PrecomputedFeatures(features.shape[1])
    bootstrap, halves = [], []
    half = len(features) // 2
    for _ in range(repetitions):
        drawn = torch.randint(len(features), (bootstrap_n,), generator=generator)
        bootstrap.append(frechet_distance(features, features[drawn], identity))
        order = torch.randperm(len(features), generator=generator)
        halves.append(frechet_distance(features[order[:half]], features[order[half : 2 * half]], identity))
    return Floor("bootstrap", bootstrap_n, tuple(bootstrap)), Floor("halves", half, tuple(halves))


@dataclass(frozen=True)
class DistanceSpread:
    """Distances of several independent draws of one model against one reference.

    Their standard deviation is the metric's own noise at this `n`; it does not cover training seeds.
    """

    n: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "draws": list(self.values),
            "mean": self.mean,
            "sd": self.standard_deviation if len(self.values) > 1 else None,
        }
