"""Each group's budget as a share of the base's cost (MACs, or time), and the order of the groups by difficulty.

Source: arXiv 2312.13307. With the N groups ranked from easiest (i = 1) to hardest (i = N), the base costing F and
0 < k <= 1, group i gets `FLOPs_g(i) = (i/N + (N - i)/N * k) * F`: the hardest keeps the whole base and k bounds the
rest. The mean over groups is `(N+1)/(2N) + k * (N-1)/(2N)` of F.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from typing import cast

import numpy as np

from tdc_fast.errors import integer, invalid

DIFFICULTIES = ("snr", "snr-reversed")


def budget_law(num_groups: int, k: float) -> tuple[float, ...]:
    """Shares of the base's MACs, easiest group first, hardest (always 1.0) last.

    Args:
        num_groups: N.
        k: lower bound of the shares, in (0, 1]; 1 means no pruning.

    Raises:
        ValueError: an argument is out of range.
    """
    num_groups = integer("num_groups", num_groups)
    if isinstance(k, bool) or not isinstance(k, (int, float, np.number)) or not 0 < k <= 1:
        raise invalid("k", k, "a number with 0 < k <= 1 (1 leaves every group whole)")
    bound = Fraction(str(float(k)))  # exactly the decimal as written, so that equal shares stay equal
    return tuple(
        float(Fraction(i, num_groups) + Fraction(num_groups - i, num_groups) * bound) for i in range(1, num_groups + 1)
    )


def difficulty_order(
    groups: Iterable[tuple[int, int]], snr_db: Sequence[float] | np.ndarray, difficulty: str | Sequence[float] = "snr"
) -> tuple[int, ...]:
    """Group indices from easiest to hardest; of equally difficult groups the lower index counts as easier.

    Args:
        groups: (start, stop) of every group; a TimestepGroups will do.
        snr_db: signal-to-noise ratio of every timestep in decibels, (T,).
        difficulty: "snr" rises with the group's mean SNR, since noise is hard to predict where there is little of it;
            "snr-reversed" falls with it; N numbers, such as each group's measured loss, are the difficulty itself.

    Raises:
        ValueError: `difficulty` is none of these, or `snr_db` is too short.
    """
    intervals = list(groups)
    if isinstance(difficulty, str):
        if difficulty not in DIFFICULTIES:
            raise invalid("difficulty", difficulty, f"one of {DIFFICULTIES}, or one number per group")
        snr = np.asarray(snr_db, dtype=np.float64)
        if snr.ndim != 1 or not intervals or intervals[-1][1] > len(snr):
            raise invalid("snr_db", snr.shape, "one value for every timestep that the groups cover")
        level = np.array([snr[start:stop].mean() for start, stop in intervals])
        score = level if difficulty == "snr" else -level
    else:
        score = np.asarray(difficulty, dtype=np.float64)
        if score.shape != (len(intervals),) or not np.isfinite(score).all():
            raise invalid("difficulty", difficulty, f"{len(intervals)} finite numbers, one per group")
    return tuple(int(group) for group in np.argsort(score, kind="stable"))


def group_fractions(
    groups: Iterable[tuple[int, int]],
    snr_db: Sequence[float] | np.ndarray,
    k: float | Sequence[float],
    difficulty: str | Sequence[float] = "snr",
) -> tuple[float, ...]:
    """The share of the base's MACs that each group may use, in the order of the groups.

    Args:
        groups: (start, stop) of every group.
        snr_db: signal-to-noise ratio of every timestep in decibels, (T,).
        k: a number applies the budget law in the order of difficulty; a sequence gives every group's share directly,
            whatever its difficulty (see `keep_fractions`).
        difficulty: see `difficulty_order`.

    Raises:
        ValueError: an argument is out of range.
    """
    count = len(list(groups))
    if np.ndim(k) == 1:
        return explicit_fractions(cast(Sequence[float], k), count)
    law = budget_law(count, cast(float, k))
    fractions = [0.0] * count
    for group, fraction in zip(difficulty_order(groups, snr_db, difficulty), law, strict=True):
        fractions[group] = fraction
    return tuple(fractions)


def explicit_fractions(fractions: Sequence[float], num_groups: int) -> tuple[float, ...]:
    """Check shares given by hand: one per group, each in (0, 1].

    Raises:
        ValueError: naming the share.
    """
    given = tuple(float(fraction) for fraction in fractions)
    if len(given) != num_groups:
        raise invalid("k", given, f"a share for each of the {num_groups} groups, or one number for the law")
    for group, fraction in enumerate(given):
        if not 0 < fraction <= 1:
            raise invalid(f"k[{group}]", fraction, "a share of the base's MACs in (0, 1]")
    return given


def keep_fractions(num_groups: int, keep: float, whole: Collection[int] = ()) -> tuple[float, ...]:
    """The same share for every group, except for those that keep the whole base.

    Args:
        num_groups: N.
        keep: the share.
        whole: indices of the groups that keep the whole base.

    Raises:
        ValueError: an argument is out of range.
    """
    strangers = sorted(set(whole) - set(range(num_groups)))
    if strangers:
        raise invalid("whole", strangers, f"group indices from 0 to {num_groups - 1}")
    return explicit_fractions([1.0 if group in whole else keep for group in range(num_groups)], num_groups)


def budget_of(fraction: float, base_cost: int) -> int:
    """The budget in what the base's cost is in: the largest integer not above `fraction * base_cost`."""
    return math.floor(Fraction(str(float(fraction))) * base_cost)
