"""Which timesteps a training batch has: uniform, by the loss's second moment, or in fixed shares per group."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tdc_fast.errors import integer, invalid

Weighting = Literal["unbiased", "per_group", "none"]


class Groups(Protocol):
    """The part of `TimestepGroups` that stratified sampling needs."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Boundaries (N + 1,): group i is [boundaries[i], boundaries[i + 1])."""

    def overlapping(self, share: float) -> tuple[tuple[int, int], ...]:
        """Each group's interval (start, stop), extended into its neighbours by `share` of their timesteps."""


class Draw(NamedTuple):
    """A batch of timesteps.

    Attributes:
        t: timesteps, int64 (B,).
        weights: loss weights, float32 (B,).
        groups: the group that each timestep was drawn for, int64 (B,); None without groups.
    """

    t: Tensor
    weights: Tensor
    groups: Tensor | None = None


class TimestepSampler:
    """Draws timesteps t (B,) and loss weights (B,); the training loss is mean(weights * losses).

    Random numbers come only from the generator passed in. Everything else that a resumed run needs is in `state_dict`,
    as plain numbers, lists and tensors.

    A draw has two parts, so that a step on a GPU does not wait for it: `prepare` does what needs the host, `draw` the
    rest on the device. `sample` is both.

    Attributes:
        num_timesteps: T.
        adaptive: whether `update` learns from losses.
    """

    num_timesteps: int
    adaptive: ClassVar[bool] = False

    def sample(
        self, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch.

        Args:
            batch_size: B.
            generator: where random numbers come from; None for torch's default generator.
            device: where to put the result; None for the CPU.

        Returns:
            Timesteps, int64 (B,), and weights, float32 (B,).
        """
        drawn = self._sampled(batch_size, generator, device)
        return drawn.t, drawn.weights

    def prepare(self, batch_size: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The part of a draw that needs the host; advances what `state_dict` holds.

        Args:
            batch_size: B.
            generator: where random numbers come from; None for torch's default generator.

        Returns:
            Tensors (B,) on the CPU, to be given to `draw` on its device.
        """
        integer("batch_size", batch_size, 0)
        return {}

    def draw(
        self,
        batch_size: int,
        prepared: Mapping[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """The rest of a draw, without waiting for the device.

        Args:
            batch_size: B.
            prepared: what `prepare` returned, on the device.
            generator: where random numbers come from, on the device; None for its default generator.
            device: where the result is; None for the CPU.
        """
        raise NotImplementedError

    def _sampled(self, batch_size: int, generator: torch.Generator | None, device: torch.device | str | None) -> Draw:
        """A whole draw on the generator's own device: a seed gives the same draw on all devices."""
        home = _home(generator)
        prepared = {name: value.to(home) for name, value in self.prepare(batch_size, generator=generator).items()}
        t, weights, groups = self.draw(batch_size, prepared, generator=generator, device=home)
        return Draw(t.to(device), weights.to(device), None if groups is None else groups.to(device))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses (B,) at timesteps t (B,); only adaptive samplers do."""

    def settle(self, total: Callable[[Tensor], Tensor], keep: bool) -> None:
        """Bring together what several processes have learned, each from its own samples.

        Args:
            total: adds up a tensor over all processes.
            keep: whether this process goes on with the totals; the others begin anew, so that nothing counts twice.
        """

    def columns(self) -> dict[str, float]:
        """What the log has in columns of its own, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; ValueError if a sampler with other settings wrote it."""
        _check_keys(state, set())


class UniformSampler(TimestepSampler):
    """All timesteps equally likely, all weights 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = integer("num_timesteps", num_timesteps)

    def draw(
        self,
        batch_size: int,
        prepared: Mapping[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """See `TimestepSampler.draw`."""
        t = torch.randint(self.num_timesteps, (batch_size,), generator=generator, device=device)
        return Draw(t, torch.ones(batch_size, device=device))


class LossSecondMomentSampler(TimestepSampler):
    """Importance sampling with probability proportional to sqrt(E[loss**2]) (Nichol and Dhariwal 2021, section 3.3).

    Uniform until every timestep has `history_per_term` losses; from then on the last `history_per_term` count, and
    `uniform_prob` of the probability stays uniform. Uniform, too, while all of these losses are 0 or one of them is not
    finite. The weights 1 / (T p) keep the loss unbiased. Of several processes each keeps the same history: `update`
    gets the losses of the whole batch in all of them.

    The history is on the device where timesteps are drawn, and in place, so that a CUDA graph can hold `draw` and
    `update`; neither waits for the device.
    """

    adaptive = True

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        if not 0 <= uniform_prob <= 1:
            raise invalid("uniform_prob", uniform_prob, "a share of the probability, from 0 to 1")
        self.num_timesteps = integer("num_timesteps", num_timesteps)
        self.history_per_term = integer("history_per_term", history_per_term)
        self.uniform_prob = uniform_prob
        self._history = torch.zeros(num_timesteps, history_per_term, dtype=torch.float64)  # oldest first
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """The current probability of each timestep, float64 (T,)."""
        weights = self._history.square().mean(1).sqrt()
        total = weights.sum()
        weights = weights / total * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        usable = (self._counts == self.history_per_term).all() & total.isfinite() & (total > 0)
        return torch.where(usable, weights / weights.sum(), 1 / self.num_timesteps)

    def draw(
        self,
        batch_size: int,
        prepared: Mapping[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """See `TimestepSampler.draw`."""
        home = torch.device("cpu" if device is None else device)
        self._history, self._counts = self._history.to(home), self._counts.to(home)
        p = self.probabilities()
        u = torch.rand(batch_size, generator=generator, device=home, dtype=torch.float64)
        # Two rows, as a GPU adds up a single one in an order that may change from run to run.
        sums = p.expand(2, -1).cumsum(1)[0]
        t = torch.searchsorted(sums, u, right=True).clamp(max=self.num_timesteps - 1)
        return Draw(t, (1 / (self.num_timesteps * p[t])).float())

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Add the losses (B,) at timesteps t (B,) to the history."""
        t, losses = t.to(self._history.device), losses.detach().to(self._history.device, torch.float64)
        length = self.history_per_term
        # As if appended one by one: of equal timesteps, each loss comes after those earlier in the batch.
        earlier = (t[:, None] == t[None, :]).tril(-1).sum(1)  # (B,)
        counts = self._counts.index_add(0, t, torch.ones_like(t))
        dropped = (counts - length).clamp(min=0)  # (T,) of the oldest
        kept = torch.arange(length, device=t.device) + dropped[:, None]
        history = self._history.gather(1, kept.clamp(max=length - 1)).flatten()  # what follows is overwritten
        place = self._counts[t] + earlier - dropped[t]
        beyond = self.num_timesteps * length  # one more place, for losses that are dropped at once
        place = torch.where(place >= 0, t * length + place, beyond)
        history = torch.cat([history, history.new_zeros(1)]).scatter(0, place, losses)[:beyond]
        self._history.copy_(history.view_as(self._history))
        self._counts.copy_(counts.clamp(max=length))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"history": self._history.clone().cpu(), "counts": self._counts.clone().cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, not within a graph; ValueError if a sampler with other settings wrote it."""
        _check_keys(state, {"history", "counts"})
        expected = tuple(self._history.shape)
        if tuple(state["history"].shape) != expected or tuple(state["counts"].shape) != expected[:1]:
            raise invalid(
                "state", f"history of shape {tuple(state['history'].shape)}", f"{expected}, as this sampler has"
            )
        self._history = state["history"].to(self._history, copy=True)
        self._counts = state["counts"].to(self._counts, copy=True)


class StratifiedSampler(TimestepSampler):
    """Fixed shares of every batch per group of timesteps, uniform within the group.

    When the shares do not divide a batch, the groups take turns with the remainder: at a constant batch size no group
    is ever a whole sample away from its exact share of all samples so far. Groups alternate along the batch, so that
    contiguous microbatches are balanced too.
    """

    def __init__(
        self,
        groups: Groups,
        shares: Sequence[float] | None = None,
        *,
        weighting: Weighting = "unbiased",
        overlap: float = 0.0,
    ) -> None:
        """Set the shares.

        Args:
            groups: the N groups.
            shares: share of the batch per group, relative to their sum; None for equal shares.
            weighting: "unbiased" gives the expected loss of uniform timesteps, (group size / T) / share; "per_group"
                gives every group the same total, 1 / (N * share); "none" gives ones: a group counts by its share.
            overlap: how far each group's timesteps reach into its neighbours (soft boundaries), as a share of theirs. A
                timestep may then belong to either of two groups; a draw says to which. Not with "unbiased".

        Raises:
            ValueError: for shares that are not positive or not one per group, or an unknown weighting.
        """
        edges = [int(edge) for edge in groups.boundaries]
        count = len(edges) - 1
        if shares is None:
            shares = [1.0] * count
        if len(shares) != count:
            raise invalid("shares", list(shares), f"one share per group ({count})")
        if not all(np.isfinite(share) and share > 0 for share in shares):
            raise invalid("shares", list(shares), "positive shares")
        if weighting not in ("unbiased", "per_group", "none"):
            raise invalid("weighting", weighting, "'unbiased', 'per_group' or 'none'")
        if overlap and weighting == "unbiased":
            raise invalid(
                "overlap", overlap, 'weighting "per_group" or "none": timesteps in two groups have no single density'
            )
        self.num_timesteps = edges[-1]
        self.num_groups = count
        intervals = torch.tensor(groups.overlapping(overlap) if overlap else list(itertools.pairwise(edges)))
        self._starts = intervals[:, 0]
        self._sizes = intervals[:, 1] - intervals[:, 0]
        self._parts = _whole_parts(shares)  # integers (N,): the shares over their sum
        self._total = int(self._parts.sum())
        exact = torch.from_numpy(self._parts / self._total)
        weights = {
            "unbiased": self._sizes / self.num_timesteps / exact,
            "per_group": 1 / (count * exact),
            "none": torch.ones(count, dtype=torch.float64),
        }
        self._weights = weights[weighting].float()
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        # Samples owed to each group, in units of 1 / total: integers, so that rounding errors cannot add up.
        self._owed = np.zeros(count, dtype=np.int64)

    def next_counts(self, batch_size: int) -> np.ndarray:
        """How many of the next batch's samples each group gets, int64 (N,); advances the rotation."""
        counts, fractions = np.divmod(batch_size * self._parts, self._total)
        remainder = batch_size - int(counts.sum())
        # Tijdeman's chairman assignment (1980): among the groups that are owed something, each left-over sample goes
        # to the one that would be owed a whole sample first.
        scale, whole = max(remainder, 1), max(remainder, 1) * self._total
        owed = self._owed * scale
        for _ in range(remainder):
            owed = owed + fractions
            slots_left = np.full(self.num_groups, np.iinfo(np.int64).max)
            due = (owed > 0) & (fractions > 0)
            slots_left[due] = -((owed[due] - whole) // fractions[due])
            # After a change of batch size no group with a fraction may be owed anything: then take the most owed.
            chosen = int(slots_left.argmin()) if due.any() else int(owed.argmax())
            owed[chosen] -= whole
            counts[chosen] += 1
        self._owed = owed // scale if remainder else self._owed
        return counts

    def prepare(self, batch_size: int, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The group of each sample, int64 (B,)."""
        batch_size = integer("batch_size", batch_size, 0)
        return {"groups": torch.from_numpy(_interleaved(self.next_counts(batch_size)))}

    def groups_ahead(self, batch_size: int, ahead: int) -> np.ndarray:
        """The groups that `prepare` gives the samples of a later batch, int64 (B,), if the shares stay as they are.

        Args:
            batch_size: B.
            ahead: how many batches later than the next one.
        """
        later = copy.copy(self)
        for _ in range(ahead):
            later.next_counts(batch_size)
        return _interleaved(later.next_counts(batch_size))

    def draw(
        self,
        batch_size: int,
        prepared: Mapping[str, Tensor],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Draw:
        """See `TimestepSampler.draw`."""
        group = prepared["groups"]
        if group.device not in self._on_device:
            tables = (self._starts, self._sizes, self._weights)
            self._on_device[group.device] = tables[0].to(device), tables[1].to(device), tables[2].to(device)
        starts, sizes, weights = self._on_device[group.device]
        u = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64)
        t = starts[group] + (u * sizes[group]).long().minimum(sizes[group] - 1)
        return Draw(t, weights[group], group)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"owed": self._owed.tolist(), "parts": self._parts.tolist(), "starts": self._starts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; ValueError if a sampler with other settings wrote it."""
        _check_keys(state, {"owed", "parts", "starts"})
        for key, mine in (("parts", self._parts.tolist()), ("starts", self._starts.tolist())):
            if list(state[key]) != mine:
                raise invalid(f"state[{key!r}]", state[key], f"{mine}, from the same groups and shares")
        self._owed = np.asarray(state["owed"], dtype=np.int64)


def create_timestep_sampler(
    name: str,
    num_timesteps: int,
    *,
    groups: Groups | None = None,
    shares: Sequence[float] | None = None,
    weighting: Weighting = "unbiased",
    overlap: float = 0.0,
) -> TimestepSampler:
    """A sampler by name.

    Args:
        name: "uniform", "loss-second-moment" or "stratified".
        num_timesteps: T.
        groups: the groups, for "stratified".
        shares: see `StratifiedSampler`, as for the others below.
        weighting: which loss weights.
        overlap: soft boundaries.

    Raises:
        ValueError: for an unknown name, or groups that are missing or of another T.
    """
    if name == "uniform":
        return UniformSampler(num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentSampler(num_timesteps)
    if name == "stratified":
        if groups is None:
            raise invalid("groups", groups, "the timestep groups, which a stratified sampler needs")
        if groups.boundaries[-1] != num_timesteps:
            raise invalid("groups", f"{groups.boundaries[-1]} timesteps", f"groups of {num_timesteps} timesteps")
        return StratifiedSampler(groups, shares, weighting=weighting, overlap=overlap)
    raise invalid("schedule_sampler", name, "'uniform', 'loss-second-moment' or 'stratified'")


def _home(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _whole_parts(shares: Sequence[float]) -> np.ndarray:
    """Shares as integers in the same ratio, exact for ratios of small numbers, else to a millionth of the total."""
    total = sum(Fraction(share) for share in shares)
    parts = [(Fraction(share) / total).limit_denominator(10_000) for share in shares]
    if sum(parts) != 1:
        parts = [max(Fraction(round(Fraction(share) / total * 1_000_000)), Fraction(1)) for share in shares]
    denominator = int(np.lcm.reduce([part.denominator for part in parts]))
    if denominator > 1_000_000:
        parts = [max(Fraction(round(part * 1_000_000)), Fraction(1)) for part in parts]
        denominator = 1
    whole = np.array([int(part * denominator) for part in parts], dtype=np.int64)
    return whole // np.gcd.reduce(whole)


def _interleaved(counts: np.ndarray) -> np.ndarray:
    """Group of each position in a batch, int64 (B,), with every group spread evenly along it."""
    group = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count] or [np.zeros(0)])
    return group[np.argsort(place, kind="stable")]


def _check_keys(state: dict[str, Any], expected: set[str]) -> None:
    if set(state) != expected:
        raise invalid("state", sorted(state), f"the entries {sorted(expected)}: this is another sampler's state")
