"""Fréchet distance between two sets of images, in a feature space that the caller chooses.

Distances compare only if they have the same feature space, reference set and number of samples. The published "FID" is
this distance in the features of one particular Inception network with its own weights, see `load_inception`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.evaluation.moments import moments_distance, moments_of


def frechet_distance(a: Tensor, b: Tensor, extractor: nn.Module, *, batch_size: int = 512) -> float:
    """The Fréchet distance between the features of two image sets, computed in float64 (`moments_distance`).

    Args:
        a: (M, C, H, W), whatever the extractor takes: uint8 images for the extractors of this package.
        b: (K, C, H, W), the same.
        extractor: any module that maps images to features (M, F).
        batch_size: images at once.

    Raises:
        ValueError: a set has fewer than two members.
    """
    for name, images in (("a", a), ("b", b)):
        if len(images) < 2:
            raise invalid(name, f"{len(images)} images", "at least 2, the fewest that have a covariance")
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "at least 1")
    with torch.no_grad():
        return moments_distance(*(moments_of(map(extractor, images.split(batch_size))) for images in (a, b)))


@dataclass(frozen=True)
class Floor:
    """The distance between two sets of real images: what a perfect generator would still show with so few images.

    Attributes:
        kind: "bootstrap" compares `n` images, drawn from the reference with replacement, with the whole reference;
            "halves" compares two disjoint random halves of the reference.
        n: images drawn, or in each half.
        values: one distance per repetition.
    """

    kind: str
    n: int
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The floor as report.json holds it."""
        return {
            "kind": self.kind,
            "n": self.n,
            "mean": float(np.mean(self.values)),
            "min": min(self.values),
            "max": max(self.values),
            "repetitions": len(self.values),
        }


def real_floors(features: Tensor, *, bootstrap_n: int, repetitions: int = 8) -> tuple[Floor, Floor]:
    """Both floors of a reference set.

    Args:
        features: (M, F), features of the reference images.
        bootstrap_n: images in each bootstrap draw: as many as the samples that are compared with the reference.
        repetitions: distances per floor.

    Returns:
        The bootstrap floor and the floor of the halves.

    Raises:
        ValueError: there are fewer than four images.
    """
    if len(features) < 4:
        raise invalid("features", f"{len(features)} images", "a reference of at least 4 images")
    generator = torch.Generator().manual_seed(0)
    bootstrap, halves = [], []
    half = len(features) // 2
    whole = moments_of(features)
    for _ in range(repetitions):
        drawn = torch.randint(len(features), (bootstrap_n,), generator=generator)
        bootstrap.append(moments_distance(whole, moments_of(features[rows] for rows in drawn.split(1024))))
        order = torch.randperm(len(features), generator=generator)
        halves.append(moments_distance(*(moments_of(features[order[i * half : (i + 1) * half]]) for i in range(2))))
    return Floor("bootstrap", bootstrap_n, tuple(bootstrap)), Floor("halves", half, tuple(halves))


@dataclass(frozen=True)
class DistanceSpread:
    """Distances of several independent draws of one model from one reference.

    Their standard deviation is the noise of the metric at this number of images; it does not cover training seeds.

    Attributes:
        n: images in each draw.
        values: one distance per draw.
    """

    n: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float:
        """Sample standard deviation over the draws; NaN for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The distances as report.json holds them."""
        return {
            "n": self.n,
            "draws": list(self.values),
            "mean": self.mean,
            "sd": self.standard_deviation if len(self.values) > 1 else None,
        }
