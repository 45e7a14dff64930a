"""Noise schedules: the variance beta_t added at each of the T steps of the forward process."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tdc_fast.errors import integer, invalid

MAX_BETA = 0.999
"""Largest beta of the cosine schedule: its last step would remove all signal, which no step could reverse."""


def named_betas(name: str, num_timesteps: int) -> np.ndarray:
    """The betas of a named schedule, float64 (T,).

    Args:
        name: "linear" runs from 1e-4 to 0.02 for T = 1000 (Ho et al. 2020, section 4), both scaled by 1000 / T so that
            the total noise does not depend on T. "cosine" is alpha_bar(s) = cos((s + 0.008) / 1.008 * pi / 2)**2
            (Nichol and Dhariwal 2021, equation 17).
        num_timesteps: T.

    Raises:
        ValueError: for an unknown name or a T below 1.
    """
    num_timesteps = integer("num_timesteps", num_timesteps)
    if name == "linear":
        scale = 1000 / num_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=np.float64)
    if name == "cosine":
        return betas_for_alpha_bar(num_timesteps, lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise invalid("noise_schedule", name, "'linear' or 'cosine'")


def betas_for_alpha_bar(
    num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> np.ndarray:
    """The betas whose cumulative product of (1 - beta) follows a function.

    Args:
        num_timesteps: T.
        alpha_bar: the product at time 0 to 1.
        max_beta: largest beta.

    Returns:
        float64 (T,).
    """
    edges = [alpha_bar(step / num_timesteps) for step in range(num_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in zip(edges, edges[1:], strict=False)])
