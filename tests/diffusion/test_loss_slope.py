"""Shares of the batch move to the groups where the loss still falls, within their bounds, and groups count alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdc_fast.diffusion.loss_slope import MAX_FACTOR, LossSlopeSampler, bounded, falls
from tdc_fast.routing import TimestepGroups

GROUPS = TimestepGroups.uniform(60, 3)
FIRST = [0.5, 0.3, 0.2]


def run(sampler: LossSlopeSampler, rates: list[float], steps: int, batch: int = 20) -> np.ndarray:
    """Losses exp(-rate * step) by group, with a little noise; how many samples each group got."""
    counts = np.zeros(3)
    for step in range(steps):
        prepared = sampler.prepare(batch)
        generator = torch.Generator().manual_seed(step)
        drawn = sampler.draw(batch, prepared, generator=generator)
        noise = 1 + 1e-3 * torch.randn(batch, generator=generator)
        sampler.update(drawn.t, (-torch.tensor(rates)[drawn.groups] * step).exp() * noise)
        counts += np.bincount(drawn.groups, minlength=3)
        assert sum(sampler.shares) == pytest.approx(1)
        ratios = np.array(sampler.shares) / FIRST
        assert (ratios > 1 / MAX_FACTOR - 1e-3).all() and (ratios < MAX_FACTOR + 1e-3).all()
    return counts


def test_the_group_whose_loss_falls_gets_more_and_gives_it_back_when_it_stops():
    sampler = LossSlopeSampler(GROUPS, FIRST, window=5)
    assert sampler.shares == FIRST
    run(sampler, [0.0, 0.0, 0.02], 15)
    assert sampler.shares == FIRST  # three windows do not tell yet
    run(sampler, [0.0, 0.0, 0.02], 60)
    assert sampler.shares == pytest.approx([0.375, 0.225, 0.4], abs=0.01)  # twice its share, the rest in proportion
    assert sampler.columns() == {f"share_g{group}": share for group, share in enumerate(sampler.shares)}
    run(sampler, [0.0, 0.0, 0.0], 120)
    assert sampler.shares == pytest.approx(FIRST, abs=0.09)  # noise moves them a little


def test_falls_in_proportion_to_the_shares_change_nothing():
    """The fall that a sample buys is then the same everywhere."""
    sampler = LossSlopeSampler(GROUPS, FIRST, window=5)
    run(sampler, [0.05, 0.03, 0.02], 60)
    assert sampler.shares == pytest.approx(FIRST, abs=0.02)


def test_every_group_counts_for_a_third_of_the_loss_whatever_its_share():
    sampler = LossSlopeSampler(GROUPS, FIRST, window=5)
    run(sampler, [0.0, 0.02, 0.0], 45)
    totals, counts = torch.zeros(3), np.zeros(3)
    for _ in range(100):
        drawn = sampler.draw(20, sampler.prepare(20))
        totals.index_add_(0, drawn.groups, drawn.weights)
        counts += np.bincount(drawn.groups, minlength=3)
    torch.testing.assert_close(totals, torch.full((3,), 2000 / 3), rtol=0.01, atol=0)
    np.testing.assert_allclose(counts, 2000 * np.array(sampler.shares), atol=1.5)
    assert drawn.weights.dtype == torch.float32


def test_the_fall_of_a_line_and_its_standard_error():
    rng = np.random.default_rng(0)
    history = rng.normal(size=(7, 4)) * [0.01, 0.01, 1.0, 0.0] - np.arange(7)[:, None] * [0.1, -0.1, 0.1, 0.2]
    found = np.array(falls(history)).T
    for (fall, error), values in zip(found, history.T, strict=True):
        (slope, _), covariance = np.polyfit(np.arange(7), values, 1, cov=True)
        assert fall == pytest.approx(max(0.0, -slope)) and error == pytest.approx(covariance[0, 0] ** 0.5, abs=1e-9)
    assert found[0, 0] > 0 == found[1, 0] and found[3, 0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("gains", "shares"),
    [
        ([2, 2, 2], FIRST),
        ([1, 1, 6], [0.375, 0.225, 0.4]),
        ([6, 2, 2], [0.75, 0.15, 0.1]),  # the others keep half, so this one cannot have twice
        ([1.7, 0.7, 1.7], [0.5 * 1.7 / 1.4, 0.15, 0.2 * 1.7 / 1.4]),
        ([1e-9, 1, 1], [0.25, 0.45, 0.3]),
    ],
)
def test_targets_are_in_proportion_within_the_bounds(gains: list[float], shares: list[float]):
    np.testing.assert_allclose(bounded(np.array(FIRST), np.array(gains, dtype=float)), shares, rtol=1e-6)


def test_a_group_without_samples_in_a_window_decides_nothing():
    sampler = LossSlopeSampler(GROUPS, [0.98, 0.01, 0.01], window=1)
    for _ in range(12):
        drawn = sampler.draw(4, sampler.prepare(4))
        sampler.update(drawn.t, torch.ones(4))
    assert sampler.shares == [0.98, 0.01, 0.01]


@pytest.mark.parametrize(
    ("key", "value"),
    [("parts", [1, 2, 3]), ("history", [[1.0]]), ("first", [1.0]), ("starts", [0, 1, 2]), ("sums", torch.zeros(2, 2))],
)
def test_a_state_that_does_not_fit_is_refused(key: str, value: object):
    state = LossSlopeSampler(GROUPS, FIRST, window=2).state_dict()
    with pytest.raises(ValueError, match="state"):
        LossSlopeSampler(GROUPS, FIRST, window=2).load_state_dict({**state, key: value})


def test_a_window_needs_a_step():
    with pytest.raises(ValueError, match="window: got 0"):
        LossSlopeSampler(GROUPS, window=0)
