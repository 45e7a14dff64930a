"""The Inception Score, from the class logits of whatever network gave them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdc_fast.errors import invalid

SPLITS = 10


@dataclass(frozen=True)
class ClassScore:
    """exp of the mean divergence of an image's classes from the classes of all images.

    Attributes:
        values: one score per part of the images.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the parts: the score."""
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float:
        """Standard deviation over the parts, as it is published with the score."""
        return float(np.std(self.values))


class RunningClassScore:
    """Gathers the score of images that come in batches (Salimans et al. 2016, arXiv:1606.03498).

    The images are dealt into ten equal parts at random, as a folder may be sorted by class.

    Args:
        count: number of images that will come, at least ten.
        seed: seed of the deal.

    Raises:
        ValueError: there are fewer than ten images.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        if count < SPLITS:
            raise invalid("count", f"{count} images", f"at least {SPLITS}, one for each part")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self._part = torch.empty(count, dtype=torch.int64)
        self._part[order] = torch.arange(count) * SPLITS // count
        self._seen = 0
        self._entropy = torch.zeros(SPLITS, dtype=torch.float64)  # sum of p log p of each part
        self._classes: Tensor | None = None  # sum of p, (SPLITS, K)

    def update(self, logits: Tensor) -> None:
        """Add the logits (B, K) of the next images.

        Raises:
            FloatingPointError: infinities or NaN.
        """
        logits = logits.detach().to("cpu", torch.float64)
        if not logits.isfinite().all():
            raise FloatingPointError("the logits hold infinities or NaN; check the extractor and its weights")
        log_p = logits.log_softmax(dim=1)
        p = log_p.exp()
        part = self._part[self._seen : self._seen + len(logits)]
        self._seen += len(logits)
        if self._classes is None:
            self._classes = torch.zeros(SPLITS, logits.shape[1], dtype=torch.float64)
        self._classes.index_add_(0, part, p)
        self._entropy.index_add_(0, part, (p * log_p).sum(dim=1))

    def result(self) -> ClassScore:
        """The score of all images.

        Raises:
            ValueError: not all images have come.
        """
        if self._classes is None or self._seen != len(self._part):
            raise invalid("logits", f"those of {self._seen} images", f"those of all {len(self._part)}")
        sizes = self._part.bincount(minlength=SPLITS).double()
        q = self._classes / sizes[:, None]
        values = (self._entropy / sizes - torch.special.xlogy(q, q).sum(dim=1)).exp()
        return ClassScore(tuple(values.tolist()))
