"""Improved precision and recall: how much of either set lies in the manifold of the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdc_fast.errors import invalid

NEIGHBOURS = 3
_ROWS_AT_ONCE = 1024


class PrecisionRecall(NamedTuple):
    """Two shares, 0 to 1.

    Attributes:
        precision: share of the generated images inside the manifold of the real ones: are they plausible?
        recall: share of the real images inside the manifold of the generated ones: is everything covered?
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991).

    The manifold of a set is the union of balls around its members, each as large as the distance to its k-th nearest
    other member. Both values fall with the number of images, so they compare only between equally large sets.

    Args:
        real: features (M, F), any float dtype; distances are computed in float64, in pieces of the M x K table.
        generated: features (K, F).
        neighbours: k.

    Raises:
        ValueError: a set has no k-th neighbour, or the lengths F differ.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or len(features) <= neighbours:
            found = f"features of shape {tuple(features.shape)}"
            raise invalid(name, found, f"(M, F) of more than {neighbours} images, the neighbours of each")
    if real.shape[1] != generated.shape[1]:
        raise invalid("generated", f"{generated.shape[1]} features", f"{real.shape[1]}, as the real images have")
    if neighbours < 1:
        raise invalid("neighbours", neighbours, "at least 1")
    centre = real.double().mean(dim=0)  # smaller numbers, so that differences of their squares keep more digits
    real, generated = real.double() - centre, generated.double() - centre
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, neighbours)),
        recall=_share_inside(real, generated, _radii(generated, neighbours)),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each member to its k-th nearest other member, (M,)."""
    radii = []
    for start in range(0, len(features), _ROWS_AT_ONCE):
        distances = _squared_distances(features[start : start + _ROWS_AT_ONCE], features)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf  # not its own neighbour; copies of it are
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(_squared_distances(rows, centres) <= radii).any(dim=1) for rows in points.split(_ROWS_AT_ONCE)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(M, K), through a matrix product, which is many times faster than differences and in float64 as good as exact."""
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T).clamp_min(0)
