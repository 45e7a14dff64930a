"""Kernel distance of two sets of features: KID where the features are Inception's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdc_fast.errors import invalid

BLOCKS, BLOCK_SIZE = 100, 1000
"""As in the implementation of the paper's authors, and in torch-fidelity."""


@dataclass(frozen=True)
class KernelDistance:
    """The squared maximum mean discrepancy, estimated on random blocks of both sets.

    Attributes:
        values: the unbiased estimate of each block; negative ones happen where the sets hardly differ.
        block_size: images of either set in a block.
    """

    values: tuple[float, ...]
    block_size: int

    @property
    def mean(self) -> float:
        """Mean over the blocks: the distance."""
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float | None:
        """Standard deviation over the blocks; None for a single one."""
        return float(np.std(self.values)) if len(self.values) > 1 else None


def kernel_distance(
    a: Tensor, b: Tensor, *, blocks: int = BLOCKS, block_size: int = BLOCK_SIZE, seed: int = 0
) -> KernelDistance:
    """The unbiased polynomial MMD^2 of two sets (Binkowski et al. 2018, arXiv:1801.01401).

    The kernel is `(x . y / F + 1)^3`. Every block is drawn without replacement; blocks may share images. Where a set
    has fewer than `block_size` images, blocks are as large as the smaller set; if both are that large, there is one.

    Args:
        a: features (M, F), any float dtype; computed in float64.
        b: features (K, F).
        blocks: number of blocks.
        block_size: images of either set in a block.
        seed: seed of the blocks.

    Raises:
        ValueError: a set has fewer than two members, or they have different lengths F.
    """
    for name, features in (("a", a), ("b", b)):
        if features.dim() != 2 or len(features) < 2:
            raise invalid(name, f"features of shape {tuple(features.shape)}", "(M, F) of at least 2 images")
    if a.shape[1] != b.shape[1]:
        raise invalid("b", f"{b.shape[1]} features", f"{a.shape[1]}, as a has")
    if blocks < 1 or block_size < 2:
        raise invalid("blocks", f"{blocks} of {block_size}", "at least 1 block of at least 2 images")
    a, b = a.double(), b.double()
    size = min(block_size, len(a), len(b))
    if len(a) == len(b) == size:
        return KernelDistance((_unbiased(a, b),), size)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(blocks):
        first, second = (torch.randperm(len(features), generator=generator)[:size] for features in (a, b))
        values.append(_unbiased(a[first], b[second]))
    return KernelDistance(tuple(values), size)


def _unbiased(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD^2 of M and M features: pairs of an image with itself are left out of its own set's mean."""
    size = len(x)
    within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within / (size * (size - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
