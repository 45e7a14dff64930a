"""Stratified timesteps whose shares of the batch move to the groups where the loss still falls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tdc_fast.diffusion.timestep_samplers import Draw, Groups, StratifiedSampler
from tdc_fast.errors import invalid

_MAX_WINDOWS = 8
"""The slope of a group's loss is that of a line through at most this many windows, the last ones."""
_MIN_WINDOWS = 4
"""Windows before the first slope is measured."""
MAX_FACTOR = 2.0
"""A share stays within this factor of where it began, upwards and downwards."""
_PARTS = 10_000  # shares are whole numbers of this many parts


class LossSlopeSampler(StratifiedSampler):
    """A `StratifiedSampler` that shifts its shares after every window of steps; each group counts for 1 / N throughout.

    The mean loss L_g of every group is taken over a window. A line is fitted to log L_g over the last windows; its fall
    per window, at least 0, is f_g, and e_g its standard error. A sample of the group buys the relative fall
    b_g = f_g / share_g. The target is the first shares times b_g + mean of (b + 2 e / share) over the groups, in
    proportion, but each within a factor of `MAX_FACTOR` of the first one; the shares move half of the way to it. So
    groups keep their first shares where falls are noise.

    The losses are summed on their device, in a fixed order and in place, so that a CUDA graph can hold `update`. Once
    per window `prepare` reads them.

    Attributes:
        window: steps of a window.
        total: adds up a tensor over all processes, where each of several updates with its own samples.
    """

    adaptive: ClassVar[bool] = True

    def __init__(self, groups: Groups, shares: Sequence[float] | None = None, *, window: int) -> None:
        """Set the first shares.

        Args:
            groups: the N groups.
            shares: as for `StratifiedSampler`.
            window: steps of a window.

        Raises:
            ValueError: as `StratifiedSampler`, or for a window of no steps.
        """
        super().__init__(groups, shares, weighting="per_group")
        if window < 1:
            raise invalid("window", window, "at least one step")
        self.window = window
        self._first = self._parts / self._total
        self._inner = torch.tensor(groups.boundaries[1:-1])
        self._total = _PARTS
        self.total: Callable[[Tensor], Tensor] = _own
        self._sums = torch.zeros(2, self.num_groups, dtype=torch.float64)  # of losses, and of samples
        self._steps = 0  # of this window
        self._history: list[list[float]] = []  # log of the mean losses (N,) of the last windows
        self._set_shares(self._first)

    @property
    def shares(self) -> list[float]:
        """The current share of the batch of each group; they sum to 1."""
        return [part / _PARTS for part in self._parts.tolist()]

    def prepare(self, batch_size: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The group of each sample, int64 (B,), and its weight at the current shares, float32 (B,).

        After a whole window the shares shift first.
        """
        if self._steps >= self.window:
            self._end_window()
        self._steps += 1
        prepared = super().prepare(batch_size, generator=generator)
        return {**prepared, "weights": self._weights[prepared["groups"]]}

    def draw(
        self,
        batch_size: int,
        prepared: Mapping[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """See `TimestepSampler.draw`."""
        drawn = super().draw(batch_size, prepared, generator=generator, device=device)
        return drawn._replace(weights=prepared["weights"])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Add a step's unweighted losses (B,) at the timesteps t (B,)."""
        self._sums, self._inner = self._sums.to(t.device), self._inner.to(t.device)
        group = torch.searchsorted(self._inner, t, right=True)
        own = group == torch.arange(self.num_groups, device=t.device)[:, None]  # (N, B)
        values = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
        self._sums.add_(torch.where(own, values[:, None], 0.0).sum(2))  # not by atomics, whose order is not fixed

    def _end_window(self) -> None:
        (losses, samples), self._steps = self.total(self._sums).tolist(), 0
        self._sums.zero_()
        means = np.array(losses) / np.maximum(samples, 1)
        if not (np.isfinite(means) & (means > 0)).all():  # a group without samples, or a loss that diverged
            return
        self._history = [*self._history, np.log(means).tolist()][-_MAX_WINDOWS:]
        if len(self._history) >= _MIN_WINDOWS:
            shares = np.array(self.shares)
            gains, errors = (values / shares for values in falls(np.array(self._history)))
            floor = float(self._first @ (gains + 2 * errors))
            target = bounded(self._first, gains + floor) if floor > 0 else self._first
            self._set_shares((shares + target) / 2)

    def settle(self, total: Callable[[Tensor], Tensor], keep: bool) -> None:
        """See `TimestepSampler.settle`."""
        sums = total(self._sums)
        self._sums.copy_(sums if keep else torch.zeros_like(sums))

    def _set_shares(self, shares: np.ndarray) -> None:
        """Take the nearest whole parts; what is left over goes to the largest remainders, first ones first."""
        exact = shares / shares.sum() * _PARTS
        parts = np.maximum(np.floor(exact).astype(np.int64), 1)
        order = np.argsort(-(exact - parts), kind="stable")
        left = _PARTS - int(parts.sum())
        parts[order[: max(left, 0)]] += 1
        parts[int(parts.argmax())] += min(left, 0)
        self._parts = parts
        self._weights = torch.from_numpy(_PARTS / (self.num_groups * parts)).float()

    def columns(self) -> dict[str, float]:
        """See `TimestepSampler.columns`."""
        return {f"share_g{group}": share for group, share in enumerate(self.shares)}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "owed": self._owed.tolist(),
            "parts": self._parts.tolist(),
            "first": self._first.tolist(),
            "starts": self._starts.tolist(),
            "sums": self._sums.clone().cpu(),
            "steps": self._steps,
            "history": [list(window) for window in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, not within a graph; ValueError if a sampler with other settings wrote it."""
        mine = self.state_dict()
        if set(state) != set(mine):
            raise invalid("state", sorted(state), f"the entries {sorted(mine)}: this is another sampler's state")
        for key in ("first", "starts"):
            if list(state[key]) != mine[key]:
                raise invalid(f"state[{key!r}]", state[key], f"{mine[key]}, from the same groups and shares")
        parts, history = np.asarray(state["parts"], dtype=np.int64), [list(map(float, w)) for w in state["history"]]
        if parts.shape != (self.num_groups,) or parts.min() < 1 or parts.sum() != _PARTS:
            raise invalid("state['parts']", state["parts"], f"{self.num_groups} parts of {_PARTS}")
        if any(len(window) != self.num_groups for window in history) or state["sums"].shape != mine["sums"].shape:
            raise invalid("state['history']", len(history), f"losses of {self.num_groups} groups")
        self._set_shares(parts / _PARTS)
        self._owed = np.asarray(state["owed"], dtype=np.int64)
        self._steps, self._history = int(state["steps"]), history
        self._sums = state["sums"].to(self._sums, copy=True)


def _own(sums: Tensor) -> Tensor:
    return sums


def falls(history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fall per row of lines through log losses (K, N), K >= 3: at least 0, and its standard error, (N,) each."""
    x = np.arange(len(history)) - (len(history) - 1) / 2
    spread = (x**2).sum()
    slope = x @ history / spread
    residuals = history - history.mean(0) - np.outer(x, slope)
    error = np.sqrt((residuals**2).sum(0) / (len(history) - 2) / spread)
    return np.maximum(-slope, 0.0), error


def bounded(first: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Shares (N,) that sum to 1: `first` in proportion to positive gains, each within a factor of `MAX_FACTOR`."""

    def at(scale: float) -> np.ndarray:
        return first * np.clip(scale * gains, 1 / MAX_FACTOR, MAX_FACTOR)

    low, high = 0.0, MAX_FACTOR / gains.min()  # where all have the least, and the most
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() < 1 else (low, middle)
    return at(high) / at(high).sum()
