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


class PrecomputedFeatures(nn.Module):
    """Stands in for a feature extractor where the features (M, F) are at hand already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class RandomConvFeatures(nn.Module):
    """64 features of a small convolutional network with fixed random weights, for other images.

    Three 3x3 convolutions with ReLU and pooling, weights orthogonal from a fixed seed; the features are mean and
    standard deviation of 32 channels over the image. They follow texture, contrast and coarse shape, and know nothing
    of meaning. The weights depend on the number of channels and on nothing else, so that results of different days
    compare. Input (M, C, H, W) uint8 of any size from 4x4; output (M, 64) float32.
    """

    num_features = 64
    description = "64 features of a fixed random convolutional network (seed 0): texture and coarse shape only"

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 16), (16, 32), (32, 32)):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            nn.init.orthogonal_(conv.weight, gain=2**0.5, generator=generator)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # every layer here has a bias
            layers += [conv, nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)]
        self.layers = nn.Sequential(*layers[:-1])
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layers(images.float() / 127.5 - 1).flatten(2)
        return torch.cat([maps.mean(dim=2), maps.std(dim=2, correction=0)], dim=1)


def extract(images: Tensor, extractor: nn.Module, batch_size: int = 512) -> Tensor:
    """Features (M, F) of uint8 images (M, C, H, W), in float64 for the covariances that follow."""
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise invalid("images", f"{images.dtype} {tuple(images.shape)}", "uint8 images (M, C, H, W)")
    with torch.no_grad():
        return torch.cat([extractor(batch).double() for batch in images.split(batch_size)])


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
