"""Division of a dataset into a training part and a held-out part."""

from __future__ import annotations

import numpy as np

from tdc_fast.errors import invalid


def split_positions(blocks: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to keep and positions to hold out, both ascending; images of one block stay together.

    Args:
        blocks: (N,) int64, block of each image.
        fraction: share of the blocks to hold out, at least one.
        seed: seed of the choice.

    Raises:
        ValueError: a part would be empty.
    """
    if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise invalid("fraction", fraction, "a share between 0 and 1")
    names = np.unique(blocks)
    count = max(1, round(fraction * len(names)))
    if count >= len(names):
        raise invalid("fraction", fraction, f"a share that leaves some of {len(names)} parts to train on")
    held_names = np.random.default_rng(seed).permutation(names)[:count]
    held = np.isin(blocks, held_names)
    return np.flatnonzero(~held), np.flatnonzero(held)
