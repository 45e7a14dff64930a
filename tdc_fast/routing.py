"""Routing of a mixed batch: which group a timestep belongs to, and sorting a batch by group."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import write_json
from tdc_fast.errors import integer, invalid, is_integer
from tdc_fast.ops.checks import can_read, check_memory, require_tensors
from tdc_fast.ops.plan import INTEGER_DTYPES, RoutingPlan
from tdc_fast.text_files import read_json

__all__ = ["RoutingPlan", "TimestepGroups"]

_FORMAT_VERSION = 1
_MAX_GROUPS = 2**16
_MAX_TIMESTEPS = 2**53


class TimestepGroups:
    """N contiguous, non-empty intervals that cover the timesteps [0, T); group 0 holds timestep 0.

    `TimestepGroups([0, 250, 1000])` has the groups [0, 250) and [250, 1000); boundaries that do not start at 0 and
    increase strictly are a ValueError. Immutable. Iterating gives (start, stop) of each group; groups with the same
    intervals are equal.

    Attributes:
        boundaries: N + 1 strictly increasing integers from 0 to T; group g is [boundaries[g], boundaries[g + 1]).
        strategy: how they were found.
    """

    __slots__ = ("_inner", "boundaries", "strategy")

    boundaries: tuple[int, ...]
    strategy: str

    def __init__(self, boundaries: Sequence[int], strategy: str = "boundaries") -> None:
        values = []
        if not isinstance(boundaries, Iterable):
            raise invalid("boundaries", boundaries, "a sequence of integers")
        for value in itertools.islice(boundaries, _MAX_GROUPS + 2):
            if not is_integer(value):
                raise invalid("boundaries", value, "integers")
            values.append(int(value))
        if len(values) < 2 or values[0] != 0 or any(a >= b for a, b in itertools.pairwise(values)):
            raise invalid("boundaries", values, "values that start at 0, increase strictly and end at num_timesteps")
        if len(values) > _MAX_GROUPS + 1 or values[-1] > _MAX_TIMESTEPS:
            raise invalid("boundaries", values, f"at most {_MAX_GROUPS} groups of {_MAX_TIMESTEPS} timesteps")
        if not isinstance(strategy, str):
            raise invalid("strategy", strategy, "a string")
        self.boundaries = tuple(values)
        self.strategy = strategy
        self._inner: dict[torch.device, Tensor] = {}  # first timestep of groups 1..N-1, per device

    @classmethod
    def uniform(cls, num_timesteps: int, num_groups: int) -> TimestepGroups:
        """Groups of equal width in t, as equal as T and N allow; ValueError unless 1 <= N <= T."""
        num_timesteps, num_groups = _checked_counts(num_timesteps, num_groups)
        return cls([num_timesteps * g // num_groups for g in range(num_groups + 1)], "uniform")

    @classmethod
    def snr(
        cls, schedule: Any, num_groups: int, *, clip_db: tuple[float, float] | None = (-20.0, 20.0)
    ) -> TimestepGroups:
        """Groups of equal width in decibels of SNR(t) = 10 log10(alpha_bar_t / (1 - alpha_bar_t)).

        Every group has at least one timestep. Source of the measure: arXiv 2312.13307, section on grouping.

        Args:
            schedule: alpha_bar per timestep, (T,), falling; or any object with it as `.alphas_cumprod`.
            num_groups: N.
            clip_db: (low, high), the range of decibels that the interior boundaries divide, narrowed to what the
                schedule covers; timesteps outside it belong to the first or the last group. None divides the whole
                range: the cosine schedule (T = 1000, +44 to -86 dB) then gets 4 groups of 161, 782, 55 and 2 steps;
                over +44 to -56.15 dB they are 65, 641, 276 and 18. The default of +-20 dB, where signal and noise both
                have more than 1% of the power, gives 188, 308, 307 and 197.

        Raises:
            ValueError: for a schedule that does not fall, for N > T, and for an empty range.
        """
        alpha_bar = _alpha_bar(schedule)
        num_timesteps = len(alpha_bar)
        num_timesteps, num_groups = _checked_counts(num_timesteps, num_groups)
        with np.errstate(divide="ignore"):
            snr_db = 10.0 * (np.log10(alpha_bar) - np.log10(1.0 - alpha_bar))
        high, low = float(snr_db[0]), float(snr_db[-1])
        if clip_db is not None:
            try:
                clip_low, clip_high = (float(v) for v in clip_db)
            except (TypeError, ValueError) as error:
                raise invalid("clip_db", clip_db, "(low, high) in decibels, or None") from error
            if not clip_low < clip_high:
                raise invalid("clip_db", clip_db, "(low, high) with low < high")
            high, low = min(high, clip_high), max(low, clip_low)
        if num_groups > 1 and not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise invalid("clip_db", clip_db, "a finite range that the schedule crosses")
        steps = (high - low) / num_groups
        edges = [high - steps * g for g in range(1, num_groups)]
        inner = [int(np.searchsorted(-snr_db, -edge, side="left")) for edge in edges]
        return cls(_spread([0, *inner, num_timesteps]), "snr")

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.boundaries[-1]

    @property
    def num_groups(self) -> int:
        """N, the number of groups."""
        return len(self.boundaries) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of timesteps per group."""
        return tuple(stop - start for start, stop in self)

    def overlapping(self, share: float) -> tuple[tuple[int, int], ...]:
        """Every group's interval (start, stop), extended into each neighbour by `share` (0 to 1) of its timesteps."""
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise invalid("overlap", share, "a share of the neighbours from 0 to 1")
        reach = [round(share * size) for size in self.sizes]
        return tuple(
            (start - (reach[g - 1] if g else 0), stop + (reach[g + 1] if g + 1 < self.num_groups else 0))
            for g, (start, stop) in enumerate(self)
        )

    def group_of(self, t: Tensor) -> Tensor:
        """Group ids (int64, t's shape and device) of integer timesteps t.

        A timestep outside [0, T) raises ValueError where it can be read: on the CPU, outside torch.compile and other
        traces. On a GPU the check would have to wait. Such a timestep then belongs to the nearest group.

        Raises:
            ValueError: t is not of an integer dtype, has such a timestep, or is mapped over by torch.vmap.
        """
        require_tensors(t=t)
        if t.dtype not in INTEGER_DTYPES:
            raise invalid("t", t.dtype, "integer timesteps (the original index, not a rescaled one)")
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._functorch.is_batchedtensor(t):
            raise invalid("t", "a batch of torch.vmap", "the timesteps of all samples in one tensor, outside vmap")
        if can_read(t) and t.numel():
            check_memory(t=t)
            low, high = (int(v) for v in torch.aminmax(t))
            if low < 0 or high >= self.num_timesteps:
                raise invalid("t", low if low < 0 else high, f"timesteps in [0, {self.num_timesteps})")
        inner = None if compiling else self._inner.get(t.device)
        if inner is None:
            inner = torch.tensor(self.boundaries[1:-1], dtype=torch.int64, device=t.device)
            if not compiling:
                self._inner[t.device] = inner
        return torch.searchsorted(inner, t.to(torch.int64), right=True)

    def unvisited(self, timesteps: Iterable[int]) -> list[int]:
        """The groups that none of these timesteps belongs to."""
        visited = np.searchsorted(self.boundaries, list(timesteps), side="right") - 1
        return sorted(set(range(self.num_groups)) - {int(group) for group in visited})

    def to_json(self) -> dict[str, Any]:
        """The groups as plain JSON values, which `from_json` reads."""
        return {"version": _FORMAT_VERSION, "strategy": self.strategy, "boundaries": list(self.boundaries)}

    @classmethod
    def from_json(cls, data: Any) -> TimestepGroups:
        """The groups that `to_json` gave; ValueError for a missing or unknown field, a wrong type or version."""
        if not isinstance(data, dict):
            raise invalid("groups file", type(data).__name__, "one JSON object")
        expected = {"version", "strategy", "boundaries"}
        if set(data) != expected:
            raise invalid("groups file fields", sorted(map(str, data)), f"exactly {sorted(expected)}")
        if type(data["version"]) is not int or data["version"] != _FORMAT_VERSION:
            raise invalid("version", data["version"], f"version {_FORMAT_VERSION}, which this release reads")
        if not isinstance(data["boundaries"], list):
            raise invalid("boundaries", data["boundaries"], "a list of integers")
        return cls(data["boundaries"], data["strategy"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON atomically: a reader sees the old file or the whole new one."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TimestepGroups:
        """Reads what `save` wrote; ValueError names a file that is missing or damaged."""
        try:
            data = read_json(Path(path))
        except OSError as error:
            raise invalid("groups file", str(path), f"a file that can be read ({error.strerror})") from error
        except ValueError as error:  # not UTF-8, or not JSON
            raise invalid(f"groups file {path}", str(error), "JSON: restore it, or write it again") from error
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return self.num_groups

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.pairwise(self.boundaries)

    def __eq__(self, other: object) -> bool:
        """Whether the intervals are the same; `strategy` does not count."""
        return isinstance(other, TimestepGroups) and self.boundaries == other.boundaries

    def __hash__(self) -> int:
        return hash(self.boundaries)

    def __repr__(self) -> str:
        return f"TimestepGroups({list(self.boundaries)}, strategy={self.strategy!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.to_json()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["boundaries"], state["strategy"])  # type: ignore[misc]


def _checked_counts(num_timesteps: int, num_groups: int) -> tuple[int, int]:
    """Returns T and N; ValueError unless there is a timestep for every group."""
    num_timesteps, num_groups = integer("num_timesteps", num_timesteps), integer("num_groups", num_groups)
    if num_groups > min(num_timesteps, _MAX_GROUPS):
        raise invalid("num_groups", num_groups, f"1 to num_timesteps = {num_timesteps}, and at most {_MAX_GROUPS}")
    return num_timesteps, num_groups


def _alpha_bar(schedule: Any) -> np.ndarray:
    values = getattr(schedule, "alphas_cumprod", schedule)
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    alpha_bar = np.asarray(values, dtype=np.float64)
    if alpha_bar.ndim != 1 or not len(alpha_bar):
        raise invalid("schedule", f"alpha_bar of shape {alpha_bar.shape}", "alpha_bar of shape (T,)")
    if not (np.all(alpha_bar >= 0) and np.all(alpha_bar <= 1) and np.all(np.diff(alpha_bar) <= 0)):
        raise invalid("schedule", "alpha_bar that leaves [0, 1] or rises", "alpha_bar falling within [0, 1]")
    return alpha_bar


def _spread(boundaries: list[int]) -> list[int]:
    """Moves interior boundaries as little as possible so that every group has a timestep."""
    count = len(boundaries) - 1
    for g in range(1, count):
        boundaries[g] = max(boundaries[g], boundaries[g - 1] + 1)
    for g in range(count - 1, 0, -1):
        boundaries[g] = min(boundaries[g], boundaries[g + 1] - 1)
    return boundaries
