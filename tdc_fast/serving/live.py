"""A request in the engine: what its steps are, and where it stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tdc_fast.diffusion.trajectory import Trajectory
from tdc_fast.serving.generation import Generation
from tdc_fast.serving.request import Request


@dataclass(frozen=True)
class Plan:
    """A trajectory in the form that batches read.

    Attributes:
        timesteps: int64 (S,).
        weights: float32 (8, S).
        experts: the expert of every timestep, int64 (S,); zeros without groups.
        draws_noise: see `Trajectory`.
        remembers: see `Trajectory`.
    """

    timesteps: np.ndarray
    weights: np.ndarray
    experts: np.ndarray
    draws_noise: bool
    remembers: bool

    @classmethod
    def of(cls, trajectory: Trajectory, expert_of: Callable[[Tensor], Tensor]) -> Plan:
        """The plan of a trajectory; `expert_of` maps timesteps to experts."""
        return cls(
            trajectory.timesteps.numpy(),
            trajectory.weights.to(torch.float32).numpy(),
            expert_of(trajectory.timesteps).numpy(),
            trajectory.draws_noise,
            trajectory.remembers,
        )


@dataclass(eq=False)
class LiveRequest:
    """A request from admission to its end; belongs to the engine's thread, except for `given_up`.

    Attributes:
        request: what was asked for.
        plan: its steps.
        number: counts requests in the order of their arrival.
        arrived: the engine's step at which it arrived.
        submitted: when, on the monotonic clock.
        deadline: when it expires, on the same clock.
        position: steps done.
        started: when its first step began; None before.
        given_up: the caller wants it no more.
        generator: where its noise comes from; None before the first step.
        labels: the classes of its images, int64 (M,), once it has begun.
        guidance: the guidance scale of every step less 1, float32 (S,).
        most_rows: places in a batch that a step takes at most.
        x: its images between two steps in which it takes part; None while a batch holds them, and before the first.
        last_x0: likewise, the x0 of its last step.
    """

    request: Request
    plan: Plan
    number: int
    arrived: int
    submitted: float = field(default_factory=time.monotonic)
    position: int = 0
    started: float | None = None
    given_up: bool = False
    generator: torch.Generator | None = None
    labels: Tensor | None = None
    x: Tensor | None = None
    last_x0: Tensor | None = None

    def __post_init__(self) -> None:
        timeout = self.request.timeout
        self.deadline = math.inf if timeout is None else self.submitted + timeout
        self.most_rows = rows_of(self.request)
        scales = np.atleast_1d(np.asarray(self.request.guidance_scale, dtype=np.float64))
        of_step = scales[self.plan.experts] if len(scales) > 1 else np.full(self.plan.timesteps.size, scales[0])
        self.guidance = (of_step - 1).astype(np.float32)
        self._guided = of_step != 1
        self._last = len(of_step) - 1
        self._all_guided = bool(self._guided.all())
        self._is_mixed = bool(self._guided.any()) and not self._all_guided
        self.generation: Generation

    @property
    def remaining(self) -> int:
        """Steps to do."""
        return self.plan.timesteps.size - self.position

    @property
    def is_guided(self) -> bool:
        """Whether its next step has guidance; after the last one, whether that had."""
        return bool(self._guided[min(self.position, self._last)]) if self._is_mixed else self._all_guided

    @property
    def rows(self) -> int:
        """Places in a batch that its next step takes: two for each guided image."""
        return self.request.num_images * (2 if self.is_guided else 1)

    @property
    def alike(self) -> int:
        """Steps from the next one on that take as many places as it."""
        if not self._is_mixed:
            return self.remaining
        coming = self._guided[self.position :]
        others = np.flatnonzero(coming != coming[:1])
        return int(others[0]) if len(others) else len(coming)

    @property
    def work(self) -> int:
        """Places that all its steps to do take together."""
        coming = self._guided[self.position :]
        return self.request.num_images * int(len(coming) + np.count_nonzero(coming))


def rows_of(request: Request) -> int:
    """Places in a batch that a request takes at most: two for each guided image."""
    is_guided = np.any(np.asarray(request.guidance_scale) != 1)
    return request.num_images * (2 if is_guided else 1)
