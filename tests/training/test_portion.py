"""Parts of a batch: together they are the batch, they are foreseen, and what is learned from them is joined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.diffusion.loss_slope import LossSlopeSampler
from tdc_fast.diffusion.timestep_samplers import StratifiedSampler
from tdc_fast.distributed import place_experts
from tdc_fast.routing import TimestepGroups
from tdc_fast.training.portion import Portion
from tdc_fast.training.telemetry import RunningMeans

GROUPS = TimestepGroups.uniform(60, 3)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 7), batch=st.integers(7, 40), data=st.data())
def test_the_parts_of_all_processes_are_the_batch(size, batch, data):
    whole = [Portion(batch, rank, size) for rank in range(size)]
    parts = [portion.places(None) for portion in whole]
    assert sorted(np.concatenate(parts)) == list(range(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

    groups = np.array(data.draw(st.lists(st.integers(0, 2), min_size=batch, max_size=batch)))
    teams = place_experts([3, 2, 1], [0, 1, 2], size)
    own = [
        Portion(batch, member, len(team.ranks), team.groups).places(groups)
        for team in teams
        for member in range(len(team.ranks))
    ]
    assert sorted(np.concatenate(own)) == list(range(batch))


def test_the_places_in_later_batches_are_foreseen():
    sampler, portion = StratifiedSampler(GROUPS, [0.5, 0.3, 0.2]), Portion(7, 0, 2, (0, 2))
    foreseen: dict[int, list[np.ndarray]] = {}
    for step in range(8):
        places = portion.places(sampler.prepare(7)["groups"].numpy())
        assert all(np.array_equal(places, earlier) for earlier in foreseen.get(step, []))
        for ahead in (1, 2, 3):
            foreseen.setdefault(step + ahead, []).append(portion.later(sampler, ahead))
    assert len(foreseen[7]) == 3


def test_shares_move_as_in_one_process():
    one, parts = LossSlopeSampler(GROUPS, window=2), [LossSlopeSampler(GROUPS, window=2) for _ in range(2)]
    for step in range(40):
        sums = parts[0]._sums + parts[1]._sums
        for sampler in parts:
            sampler.total = lambda own, sums=sums: sums.clone()
        prepared = [sampler.prepare(12)["groups"] for sampler in (one, *parts)]
        assert torch.equal(prepared[0], prepared[1]) and torch.equal(prepared[0], prepared[2])
        t = prepared[0] * 20
        losses = torch.exp(-0.02 * step * prepared[0])
        one.update(t, losses)
        for number, sampler in enumerate(parts):  # the first has group 0, the second the others
            mine = (prepared[0] > 0) == (number == 1)
            sampler.update(t[mine], losses[mine])
        if step == 25:  # as for a checkpoint
            totals = parts[0]._sums + parts[1]._sums
            parts[0].settle(lambda own, totals=totals: totals, keep=True)
            parts[1].settle(lambda own, totals=totals: totals, keep=False)
    assert one.shares == parts[0].shares == parts[1].shares != [1 / 3] * 3


@pytest.mark.parametrize("partial", [False, True])
def test_means_and_norms_of_all_processes_are_those_of_one(partial):
    device = torch.device("cpu")
    one = RunningMeans(3, device)
    parts = [RunningMeans(3, device, partial_norms=partial) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        losses, groups = torch.rand(8, generator=generator, dtype=torch.float64), torch.arange(8) % 3
        norms = torch.rand(2, generator=generator, dtype=torch.float64)
        one.add({"loss": losses}, groups, groups)
        one.add_gradient_norm(norms.norm() if partial else norms[0])
        for rank, means in enumerate(parts):
            means.add({"loss": losses[rank::2]}, groups[rank::2], groups[rank::2])
            means.add_gradient_norm(norms[rank] if partial else norms[0])
        if step == 3:  # in the middle, as for a checkpoint
            settle(parts)
    settle(parts)
    assert parts[0].take() == pytest.approx(one.take())
    assert all(value in (None, 0) for value in parts[1].take().values())


def settle(parts: list[RunningMeans]) -> None:
    """What the processes do together, one after the other."""
    sent: list[torch.Tensor] = []

    def send(values: torch.Tensor) -> torch.Tensor:
        sent.append(values)
        raise StopIteration

    for means in parts:
        with pytest.raises(StopIteration):
            means.settle(send, keep=False)
    for rank, means in enumerate(parts):
        means.settle(lambda values: sent[0] + sent[1], keep=rank == 0)
