from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.diffusion import (
    LossSecondMomentSampler,
    LossSlopeSampler,
    StratifiedSampler,
    UniformSampler,
    create_timestep_sampler,
)
from tdc_fast.graphs import graphed, use_capture
from tdc_fast.routing import TimestepGroups
from tests.graphs.tape import TapeCapture

GROUPS = TimestepGroups([0, 10, 40, 100])
ALL = {
    "uniform": lambda: UniformSampler(100),
    "loss-second-moment": lambda: LossSecondMomentSampler(100, history_per_term=2),
    "stratified": lambda: StratifiedSampler(GROUPS, [0.5, 0.25, 0.25]),
    "loss slope": lambda: LossSlopeSampler(GROUPS, [0.5, 0.25, 0.25], window=2),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group_of(t: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.tensor(GROUPS.boundaries[1:]), t, right=True)


@pytest.mark.parametrize("name", ALL)
def test_timesteps_are_integers_in_range_decided_by_the_generator_alone(name):
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    t, weights = ALL[name]().sample(64, generator=seeded(1))
    assert t.dtype == torch.int64 and t.shape == weights.shape == (64,) and weights.dtype == torch.float32
    assert t.min() >= 0 and t.max() < 100
    assert torch.equal(torch.get_rng_state(), untouched)
    assert torch.equal(t, ALL[name]().sample(64, generator=seeded(1))[0])
    assert not torch.equal(t, ALL[name]().sample(64, generator=seeded(2))[0])


@pytest.mark.parametrize("name", [name for name in ALL if name != "loss slope"])
def test_the_weights_keep_the_mean_loss_unbiased(name):
    sampler, draw, loss = ALL[name](), seeded(0), torch.linspace(0.1, 2, 100) ** 2
    for _ in range(3 if name == "loss-second-moment" else 0):
        sampler.update(torch.arange(100), loss)
    t, weights = sampler.sample(100_000, generator=draw)
    assert (weights * loss[t]).mean().item() == pytest.approx(loss.mean().item(), rel=0.01)


@pytest.mark.parametrize("name", ALL)
def test_a_restored_sampler_continues_bit_for_bit(name):
    sampler = ALL[name]()

    def advance(sampler, draw):
        t, weights = sampler.sample(61, generator=draw)
        sampler.update(t, t.double() ** 0.5 + 1)
        return t, weights

    draw = seeded(3)
    for _ in range(13):  # the shares are not whole here: something is owed
        advance(sampler, draw)
    state, position = copy.deepcopy(sampler.state_dict()), draw.get_state()
    continued = [advance(sampler, draw) for _ in range(5)]
    restored, draw = ALL[name](), torch.Generator()
    restored.load_state_dict(state)
    draw.set_state(position)
    for (t, weights), (t_again, weights_again) in zip(
        continued, (advance(restored, draw) for _ in range(5)), strict=False
    ):
        assert torch.equal(t, t_again) and torch.equal(weights, weights_again)


@pytest.mark.parametrize("name", ALL)
def test_a_state_is_not_changed_by_the_sampler_going_on(name):
    sampler = ALL[name]()
    state = sampler.state_dict()
    before = copy.deepcopy(state)
    t, _ = sampler.sample(7, generator=seeded(0))
    sampler.update(t, torch.ones(7))
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value))


@pytest.mark.parametrize("name", ALL)
def test_the_state_of_another_sampler_is_refused(name):
    with pytest.raises(ValueError, match="state"):
        ALL[name]().load_state_dict({"elsewhere": 1})
    with pytest.raises(ValueError, match="state"):
        StratifiedSampler(GROUPS).load_state_dict(ALL["stratified"]().state_dict())
    with pytest.raises(ValueError, match="state"):
        LossSecondMomentSampler(99, 2).load_state_dict(ALL["loss-second-moment"]().state_dict())


def test_uniform_timesteps_cover_every_step_equally():
    t, weights = UniformSampler(10).sample(50_000, generator=seeded(0))
    assert (torch.bincount(t, minlength=10) / 5000 - 1).abs().max() < 0.05
    assert (weights == 1).all()


def test_second_moments_count_only_when_every_step_has_its_history():
    sampler = LossSecondMomentSampler(3, history_per_term=2, uniform_prob=0.1)
    sampler.update(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([5.0, 2.0, 3.0, 1.0, 2.0]))
    np.testing.assert_array_equal(sampler.probabilities().numpy(), 1 / 3)
    sampler.update(torch.tensor([2, 0]), torch.tensor([4.0, 7.0]))
    moments = np.sqrt([(1 + 49) / 2, (4 + 4) / 2, (9 + 16) / 2])  # step 0 forgot its first loss
    np.testing.assert_allclose(sampler.probabilities().numpy(), 0.9 * moments / moments.sum() + 0.1 / 3)


class ImprovedDiffusions:
    """improved-diffusion's LossSecondMomentResampler, one loss after the other."""

    def __init__(self, steps: int, history: int, uniform: float) -> None:
        self.history, self.counts, self.uniform = np.zeros((steps, history)), np.zeros(steps, dtype=np.int64), uniform

    def update(self, t, losses) -> None:
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if self.counts[step] == self.history.shape[1]:
                self.history[step, :-1] = self.history[step, 1:]
                self.history[step, -1] = loss
            else:
                self.history[step, self.counts[step]] = loss
                self.counts[step] += 1

    def weights(self):
        if (self.counts < self.history.shape[1]).any():
            return np.full(len(self.counts), 1 / len(self.counts))
        weights = np.sqrt(np.mean(self.history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform) + self.uniform / len(weights)


@pytest.mark.parametrize("history", [1, 2, 5])
def test_losses_are_remembered_as_improved_diffusion_does_it(history):
    """Also where a batch has more losses of a timestep than are kept, is empty, or has other sizes than before."""
    sampler, theirs, draw = LossSecondMomentSampler(6, history, 0.01), ImprovedDiffusions(6, history, 0.01), seeded(0)
    complete = 0
    for size in (3, 0, 17, 1, 40, 8, 60, 2, 5):
        t = (torch.rand(size, generator=draw) ** 2 * 6).long()
        losses = torch.rand(size, generator=draw)
        sampler.update(t, losses)
        theirs.update(t, losses.double())
        state = sampler.state_dict()
        assert np.array_equal(state["history"], theirs.history) and np.array_equal(state["counts"], theirs.counts)
        np.testing.assert_allclose(sampler.probabilities().numpy(), theirs.weights(), rtol=1e-14)
        complete += bool((theirs.counts == history).all())
    assert 0 < complete < 9


def test_a_graph_holds_the_draw_and_the_memory_of_losses():
    """The end of the uniform start falls into replays, and nothing is read back."""

    def step(sampler):
        def run(scale):
            t, weights, _ = sampler.draw(5, {})
            sampler.update(t, scale * (t + 1) ** 2)
            return t, weights

        return run

    plain, held = (LossSecondMomentSampler(4, history_per_term=3) for _ in range(2))
    scales, drawn, tape = [torch.tensor(1.0 + n) for n in range(12)], [], TapeCapture()
    with use_capture(tape):
        for run in (step(plain), graphed(step(held), torch.device("cpu"))):
            torch.manual_seed(0)
            drawn.append([run(scale) for scale in scales])
    assert tape.replays == 10
    for (t, weights), (again, weights_again) in zip(*drawn, strict=True):
        assert torch.equal(t, again) and torch.equal(weights, weights_again)
    assert (drawn[0][2][1] == 1).all() and not (drawn[0][-1][1] == 1).any()
    assert all(torch.equal(value, held.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("losses", [(0.0, 0.0, 0.0), (1.0, float("nan"), 2.0), (1.0, float("inf"), 2.0)])
def test_losses_that_tell_no_importance_leave_the_draw_uniform_until_better_ones_come(losses):
    sampler, t = LossSecondMomentSampler(3, history_per_term=2), torch.arange(3)
    for _ in range(2):
        sampler.update(t, torch.tensor(losses))
    assert sampler.probabilities().numpy() == pytest.approx([1 / 3] * 3)
    assert torch.equal(sampler.draw(6, {}).weights, torch.ones(6))
    for _ in range(2):
        sampler.update(t, torch.tensor([1.0, 2.0, 1.0]))
    assert sampler.probabilities().numpy() == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_uniform_share_is_a_probability(share):
    with pytest.raises(ValueError, match="uniform_prob: got"):
        LossSecondMomentSampler(4, uniform_prob=share)


def test_importance_sampling_draws_by_its_probabilities():
    sampler = LossSecondMomentSampler(4, history_per_term=1, uniform_prob=0.0)
    sampler.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    t, weights = sampler.sample(100_000, generator=seeded(0))
    torch.testing.assert_close(torch.bincount(t) / 100_000, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.01)
    torch.testing.assert_close(weights, 1 / (t + 1) * 2.5)


@settings(deadline=None, max_examples=60)
@given(
    shares=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    batch=st.integers(1, 40),
    steps=st.integers(1, 60),
)
def test_no_group_is_ever_a_whole_sample_away_from_its_share(shares, batch, steps):
    groups = TimestepGroups(tuple(range(0, 10 * len(shares) + 1, 10)))
    sampler = StratifiedSampler(groups, shares)
    exact, total = np.array(shares) / sum(shares), np.zeros(len(shares))
    for step in range(1, steps + 1):
        counts = sampler.next_counts(batch)
        assert counts.min() >= 0 and counts.sum() == batch
        total += counts
        assert np.abs(total - step * batch * exact).max() < 1


def test_shares_are_exact_after_as_many_steps_as_make_them_whole():
    sampler = StratifiedSampler(TimestepGroups((0, 1, 2, 3, 4, 5)))
    counts = [sampler.next_counts(7) for _ in range(5)]
    assert np.array_equal(np.sum(counts, axis=0), [7] * 5)
    assert all(count.max() - count.min() == 1 for count in counts)


def test_a_changing_batch_size_still_evens_out():
    sampler, total, drawn = StratifiedSampler(TimestepGroups((0, 1, 2, 3)), [0.2, 0.3, 0.5]), np.zeros(3), 0
    for step in range(200):
        size = 1 + step * 7 % 13
        total, drawn = total + sampler.next_counts(size), drawn + size
    assert np.abs(total - drawn * np.array([0.2, 0.3, 0.5])).max() < 3


def test_timesteps_are_uniform_inside_their_group():
    t, _ = StratifiedSampler(GROUPS, [1, 1, 2]).sample(80_000, generator=seeded(0))
    assert torch.bincount(group_of(t)).tolist() == [20_000, 20_000, 40_000]
    for start, stop in zip(GROUPS.boundaries, GROUPS.boundaries[1:], strict=False):
        counts = torch.bincount(t, minlength=100)[start:stop].float()
        assert (counts / counts.mean() - 1).abs().max() < 0.2


def test_every_contiguous_microbatch_is_balanced():
    t, _ = StratifiedSampler(GROUPS, [1, 1, 2]).sample(64, generator=seeded(0))
    for microbatch in group_of(t).split(16):
        assert torch.bincount(microbatch, minlength=3).tolist() == [4, 4, 8]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("unbiased", [0.1 / 0.5, 0.3 / 0.25, 0.6 / 0.25]), ("per_group", [2 / 3, 4 / 3, 4 / 3]), ("none", [1, 1, 1])],
)
def test_weights_are_as_documented(weighting, expected):
    t, weights = StratifiedSampler(GROUPS, [2, 1, 1], weighting=weighting).sample(12, generator=seeded(0))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32)[group_of(t)])


def test_float_shares_mean_what_they_say():
    sampler = StratifiedSampler(TimestepGroups((0, 1, 2, 3)), [0.1, 0.2, 0.7])
    assert sampler.next_counts(10).tolist() == [1, 2, 7]
    wide = StratifiedSampler(TimestepGroups(tuple(range(9))), [1 / 3 + i * 0.0123456789 for i in range(8)])
    assert wide.next_counts(1000).sum() == 1000


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: UniformSampler(0), "num_timesteps"),
        (lambda: UniformSampler(2.5), "num_timesteps"),
        (lambda: LossSecondMomentSampler("3"), "num_timesteps"),
        (lambda: LossSecondMomentSampler(3, history_per_term=2.5), "history_per_term"),
        (lambda: StratifiedSampler(GROUPS, [1, 1]), "shares"),
        (lambda: StratifiedSampler(GROUPS, [1, 0, 1]), "shares"),
        (lambda: StratifiedSampler(GROUPS, [1, float("nan"), 1]), "shares"),
        (lambda: StratifiedSampler(GROUPS, weighting="balanced"), "weighting"),
        (lambda: create_timestep_sampler("stratified", 100), "groups"),
        (lambda: create_timestep_sampler("stratified", 99, groups=GROUPS), "groups"),
        (lambda: create_timestep_sampler("random", 100), "schedule_sampler"),
    ],
)
def test_bad_settings_are_refused_by_name(call, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        call()


def test_samplers_are_found_by_the_names_of_the_command_line():
    assert isinstance(create_timestep_sampler("uniform", 10), UniformSampler)
    assert isinstance(create_timestep_sampler("loss-second-moment", 10), LossSecondMomentSampler)
    assert isinstance(create_timestep_sampler("stratified", 100, groups=GROUPS), StratifiedSampler)


def test_overlap_draws_from_the_neighbours_and_says_for_which_group():
    groups = TimestepGroups([0, 40, 60, 100])
    assert groups.overlapping(0.25) == ((0, 45), (30, 70), (55, 100))
    sampler = StratifiedSampler(groups, weighting="per_group", overlap=0.25)
    t, weights, group = sampler.draw(3000, sampler.prepare(3000), generator=torch.Generator().manual_seed(0))
    assert group.bincount().tolist() == [1000] * 3 and (weights == 1).all()
    for g, (start, stop) in enumerate(groups.overlapping(0.25)):
        drawn = t[group == g]
        assert set(drawn.tolist()) == set(range(start, stop))


def test_overlap_has_no_unbiased_weights():
    groups = TimestepGroups.uniform(100, 2)
    with pytest.raises(ValueError, match="overlap.*0.1"):
        StratifiedSampler(groups, overlap=0.1)
    with pytest.raises(ValueError, match="overlap.*-1"):
        groups.overlapping(-1)
