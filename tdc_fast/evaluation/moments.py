"""Mean and covariance of features, gathered batch by batch, and the Fréchet distance of two of them.

A covariance is held as a root R, (r, F), with R^T R = covariance, and is never multiplied out: the trace of
(cov_a cov_b)^(1/2) is the sum of the singular values of R_a R_b^T. So singular covariances, as those of fewer images
than features are, lose no digits, and no square root of a matrix is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdc_fast.errors import invalid

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features.

    Attributes:
        count: number of feature vectors; 0 if it is not known.
        mean: (F,) float64.
        root: (r, F) float64 with root^T root = covariance (unbiased: divided by count - 1), r at most F.
    """

    count: int
    mean: Tensor
    root: Tensor

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> Moments:
        """Moments from a stored mean and covariance, of an unknown number of feature vectors.

        Args:
            mean: (F,).
            covariance: (F, F), symmetric and positive semi-definite up to rounding to float32.

        Raises:
            ValueError: another shape, values that are no numbers, or a matrix that is no covariance.
        """
        mean, covariance = mean.double(), covariance.double()
        found = f"mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}"
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
            raise invalid("covariance", found, "a mean (F,) and a covariance (F, F)")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise invalid("covariance", f"{found} with infinities or NaN", "finite numbers")
        scale = covariance.abs().max()
        if (covariance - covariance.T).abs().max() > 1e-3 * scale:
            raise invalid("covariance", f"{found}, not symmetric", "a symmetric matrix")
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        if values[0] < -1e-3 * scale:
            raise invalid("covariance", f"a matrix with the eigenvalue {float(values[0]):.3g}", "eigenvalues from 0 up")
        return cls(0, mean, values.clamp_min(0).sqrt()[:, None] * vectors.T)

    @property
    def covariance(self) -> Tensor:
        """The covariance (F, F) float64."""
        return self.root.T @ self.root


class RunningMoments:
    """Gathers the moments of features that come in batches, in memory for at most 2F + 1 rows beside a batch.

    A batch's rows are kept relative to its own mean; what that leaves out of the sum of squares is one more row. When
    there are 2F rows, they are replaced by the triangular factor of their QR decomposition, which has the same R^T R.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._rows: list[Tensor] = []
        self._num_rows = 0

    def update(self, features: Tensor) -> None:
        """Add feature vectors (B, F) of any float dtype, from any device.

        Raises:
            ValueError: another shape, or another F than before.
            FloatingPointError: infinities or NaN.
        """
        if features.dim() != 2 or (self._mean is not None and features.shape[1] != len(self._mean)):
            width = "F" if self._mean is None else str(len(self._mean))
            raise invalid("features", f"shape {tuple(features.shape)}", f"(B, {width})")
        if not len(features):
            return
        batch = features.detach().to("cpu", torch.float64)
        if not batch.isfinite().all():
            raise FloatingPointError("the features hold infinities or NaN; check the extractor and its weights")
        mean, added = batch.mean(dim=0), len(batch)
        self._add(batch - mean)
        if self._mean is None:
            self._mean = mean
        else:
            step = mean - self._mean
            self._add((math.sqrt(self.count * added / (self.count + added)) * step)[None])
            self._mean = self._mean + step * (added / (self.count + added))
        self.count += added

    def _add(self, rows: Tensor) -> None:
        self._rows.append(rows)
        self._num_rows += len(rows)
        if self._num_rows >= 2 * rows.shape[1]:
            self._compress()

    def _compress(self) -> None:
        rows = torch.cat(self._rows)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R
        self._rows, self._num_rows = [rows], len(rows)

    def result(self) -> Moments:
        """The moments of all features so far.

        Raises:
            ValueError: there are fewer than two, so that there is no covariance.
        """
        if self.count < 2 or self._mean is None:
            raise invalid("features", f"those of {self.count} images", "at least 2, the fewest that have a covariance")
        self._compress()
        return Moments(self.count, self._mean, self._rows[0] / math.sqrt(self.count - 1))


def moments_of(features: Tensor | Iterable[Tensor]) -> Moments:
    """The moments of features (M, F), or of batches (B, F) of them.

    Raises:
        ValueError: there are fewer than two.
    """
    running = RunningMoments()
    for batch in features.split(_ROWS_AT_ONCE) if isinstance(features, Tensor) else features:
        running.update(batch)
    return running.result()


def moments_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two Gaussians (Dowson and Landau 1982).

    It is `||mean_a - mean_b||^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`, computed in float64.

    Raises:
        ValueError: the moments are of features of different lengths.
    """
    if a.mean.shape != b.mean.shape:
        raise invalid("b", f"{len(b.mean)} features", f"{len(a.mean)} features, as a has")
    shared = torch.linalg.svdvals(a.root @ b.root.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * shared
    return max(0.0, float(distance))  # for equal sets rounding may give a value just below zero
