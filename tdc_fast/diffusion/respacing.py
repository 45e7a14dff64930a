"""Respacing: which of a process's timesteps a shorter process keeps, and the betas it then has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tdc_fast.errors import integer, invalid

Spacing = str | int | Sequence[int]


def spaced_timesteps(num_timesteps: int, spacing: Spacing) -> tuple[int, ...]:
    """The sorted timesteps that `spacing` keeps.

    Args:
        num_timesteps: T.
        spacing: "ddim25" keeps every k-th step starting at 0, for the smallest k that gives exactly 25 steps (Song et
            al. 2021). "10,20" or [10, 20] cuts the range into as many equal sections as there are counts (the first
            ones take the remainder); each section keeps its count, evenly spread with both ends included. "25" or 25
            is the same with one section.

    Raises:
        ValueError: when a count cannot be met.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        return _fixed_stride(num_timesteps, spacing)
    counts = _section_counts(spacing)
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (1 if section < num_timesteps % len(counts) else 0)
        if size < count:
            raise invalid(
                "timestep_respacing",
                spacing,
                f"at most {size} steps for section {section}, not {count}: it has only {size} timesteps",
            )
        # A running sum, as in improved-diffusion: a product would round some halves differently.
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return tuple(sorted(set(kept)))


def respaced_betas(alphas_cumprod: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Betas of the process of only the steps `kept` with the same marginals there, float64 (len(kept),)."""
    marginals = np.asarray(alphas_cumprod, dtype=np.float64)[list(kept)]
    return 1 - marginals / np.append(1.0, marginals[:-1])


def _fixed_stride(num_timesteps: int, spacing: str) -> tuple[int, ...]:
    try:
        wanted = int(spacing[len("ddim") :])
    except ValueError:
        raise invalid("timestep_respacing", spacing, "a count after 'ddim', such as 'ddim25'") from None
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == wanted:
            return tuple(range(0, num_timesteps, stride))
    raise invalid(
        "timestep_respacing",
        spacing,
        f"a count that an integer stride over {num_timesteps} timesteps gives; {wanted} is not one",
    )


def _section_counts(spacing: Spacing) -> list[int]:
    try:
        if isinstance(spacing, str):
            counts = [int(part) for part in spacing.split(",")]
        else:
            given = spacing if isinstance(spacing, Iterable) else [spacing]
            counts = [integer("count", count, 0) for count in given]
    except (TypeError, ValueError):
        counts = []
    if not counts or min(counts) < 0 or sum(counts) == 0:
        raise invalid("timestep_respacing", spacing, "'ddim25', a count such as '25', or counts such as '10,20'")
    return counts
