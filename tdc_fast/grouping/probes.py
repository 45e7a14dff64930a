"""Probes: short intervals of timesteps at which the base is measured; groups consist of whole probes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tdc_fast.errors import integer, invalid
from tdc_fast.routing import TimestepGroups


@dataclass(frozen=True)
class Probes:
    """P adjacent intervals that cover [0, T).

    Attributes:
        edges: P + 1 timesteps that rise from 0; probe p holds the timesteps [edges[p], edges[p + 1]).

    Raises:
        ValueError: the edges do not rise from 0.
    """

    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        edges = tuple(int(edge) for edge in self.edges)
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise invalid("edges", self.edges, "timesteps that rise from 0")
        object.__setattr__(self, "edges", edges)

    @classmethod
    def evenly(cls, num_timesteps: int, count: int) -> Probes:
        """Probes whose widths differ by one timestep at most.

        Args:
            num_timesteps: T.
            count: P.

        Raises:
            ValueError: there are more probes than timesteps.
        """
        count = integer("num_probes", count, 1, integer("num_timesteps", num_timesteps))
        return cls(tuple(num_timesteps * p // count for p in range(count + 1)))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.edges[-1]

    @property
    def sizes(self) -> np.ndarray:
        """Timesteps per probe, int64 (P,)."""
        return np.diff(self.edges)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.pairwise(self.edges)

    def groups(self, cuts: Sequence[int], strategy: str) -> TimestepGroups:
        """Timestep groups of whole probes.

        Args:
            cuts: N + 1 indices of edges; group g holds the probes [cuts[g], cuts[g + 1]).
            strategy: name of what found the cuts, kept with the groups.
        """
        return TimestepGroups([self.edges[cut] for cut in cuts], strategy)

    def nearest_cuts(self, boundaries: Sequence[int]) -> tuple[int, ...]:
        """Indices of the edges nearest to given boundaries, all different.

        Args:
            boundaries: N + 1 timesteps from 0 to T.

        Raises:
            ValueError: there are more groups than probes, or the boundaries do not rise from 0 to T.
        """
        bounds = [int(boundary) for boundary in boundaries]
        count = len(bounds) - 1
        if count < 1 or bounds[0] != 0 or bounds[-1] != self.num_timesteps or sorted(set(bounds)) != bounds:
            raise invalid("boundaries", tuple(boundaries), f"timesteps that rise from 0 to {self.num_timesteps}")
        if count > len(self):
            raise invalid("boundaries", tuple(boundaries), f"at most {len(self)} groups, one per probe")
        edges = np.asarray(self.edges)
        cuts = [int(np.abs(edges - boundary).argmin()) for boundary in bounds]
        for g in range(1, count):  # each group keeps at least one probe
            cuts[g] = min(max(cuts[g], cuts[g - 1] + 1), len(self) - (count - g))
        return tuple(cuts)
