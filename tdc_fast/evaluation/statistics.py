"""What is kept of a set of images that went through a feature extractor, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.evaluation.class_score import SPLITS, ClassScore, RunningClassScore
from tdc_fast.evaluation.moments import Moments, RunningMoments

KEPT_FEATURES = 10_000


@dataclass(frozen=True)
class SetStatistics:
    """Statistics of a set of images in one feature space.

    Attributes:
        moments: mean and covariance of the features.
        spatial: those of the spatial features; None where the extractor gives none.
        features: (K, F) float32, of some of the images, for the metrics that compare images one by one; None if only
            the moments are known.
        score: the class score; None where the extractor gives no classes, and for fewer than ten images.
    """

    moments: Moments
    spatial: Moments | None = None
    features: Tensor | None = None
    score: ClassScore | None = None


def gather_statistics(
    batches: Iterable[Tensor], count: int, extractor: nn.Module, *, kept: int = KEPT_FEATURES, seed: int = 0
) -> SetStatistics:
    """Run a set of images through an extractor.

    Args:
        batches: the images, (B, C, H, W) uint8, or whatever the extractor takes.
        count: M, how many images they are.
        extractor: maps a batch to features (B, F). If it has a method `outputs`, that is called instead, and gives an
            object with `pool` (B, F), `spatial` (B, S) and `logits` (B, K), as `InceptionFeatures.outputs` does.
        kept: most features to keep; of a larger set, those of images that are drawn at random.
        seed: seed of that draw and of the parts of the class score.

    Raises:
        ValueError: there are fewer than two images, or another number than `count`; or the extractor gives something
            else than a row of numbers for each image.
        FloatingPointError: features or logits are no numbers.
    """
    outputs = getattr(extractor, "outputs", None)
    moments, spatial = RunningMoments(), RunningMoments()
    score = RunningClassScore(count, seed) if outputs is not None and count >= SPLITS else None
    chosen = torch.ones(count, dtype=torch.bool)
    if count > kept:
        chosen.zero_()
        chosen[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    features: list[Tensor] = []
    for images in batches:
        rows = chosen[moments.count : moments.count + len(images)]
        with torch.no_grad():
            found = None if outputs is None else outputs(images)
            pool = _checked("features", extractor(images) if found is None else found.pool, len(images))
        if len(rows) != len(images):
            raise invalid("batches", f"more than {count} images", f"{count}")
        moments.update(pool)
        features.append(pool.cpu()[rows].float())
        if found is not None:
            spatial.update(_checked("spatial features", found.spatial, len(images)))
            if score is not None:
                score.update(_checked("logits", found.logits, len(images)))
    if moments.count != count:
        raise invalid("batches", f"{moments.count} images", f"{count}")
    return SetStatistics(
        moments.result(),
        spatial.result() if outputs is not None else None,
        torch.cat(features),
        score.result() if score is not None else None,
    )


def _checked(what: str, values: Any, count: int) -> Tensor:
    """What an extractor gave for a batch, without its graph, after checking that it is a row for each image."""
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or values.dim() != 2 or len(values) != count or not values.shape[1] or values.is_complex():
        found = f"{what} {values.dtype} {tuple(values.shape)}" if is_tensor else f"{what}: a {type(values).__name__}"
        raise invalid("extractor", found, f"a tensor of real numbers ({count}, F): a row for each image")
    return values.detach()
