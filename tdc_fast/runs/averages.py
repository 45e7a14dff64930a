"""How much of its starting weights a moving average still holds."""

from __future__ import annotations

UNTRAINED = 0.5
"""An average with a larger share of its starting weights counts as untrained."""


def initial_share(rate: str, steps: int) -> float:
    """The weight of the starting weights in a plain average after a number of steps.

    Args:
        rate: as written on the command line.
        steps: updates of the average.
    """
    return float(float(rate) ** steps)
