"""Held-out losses: fixed draws, honest averages, paired differences; the cost of sampling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdc_fast.diffusion import create_diffusion
from tdc_fast.evaluation.heldout import compare, heldout_losses, sampling_macs, timestep_grid
from tdc_fast.graphs import use_capture
from tdc_fast.routing import TimestepGroups
from tests.graphs.tape import TapeCapture

DIFFUSION = create_diffusion(diffusion_steps=40, noise_schedule="cosine", rescale_learned_sigmas=False)
GROUPS = TimestepGroups([0, 10, 40])


class ScaledInput(nn.Module):
    """Predicts `scale` times its input; records the batches that it saw."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.modes: list[bool] = []

    def forward(self, x, t, y=None):
        self.seen.append((x.clone(), t.clone()))
        self.modes.append(self.training)
        return self.scale * x + (0 if y is None else y.view(-1, 1, 1, 1).float())


@pytest.fixture
def x0():
    return torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_losses_are_identical_across_calls_and_batch_sizes(x0):
    losses = [
        heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=3, batch_size=size)
        for size in (512, 512, 4)
    ]
    assert torch.equal(losses[0].per_image, losses[1].per_image)
    torch.testing.assert_close(losses[0].per_image, losses[2].per_image, rtol=1e-6, atol=0)


def test_all_models_see_the_same_noisy_images_and_the_global_generator_is_left_alone(x0):
    first, second = ScaledInput(0.1), ScaledInput(0.9)
    torch.manual_seed(1)
    heldout_losses(first, DIFFUSION, x0, GROUPS, points_per_group=2)
    untouched = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), untouched)
    heldout_losses(second, DIFFUSION, x0, GROUPS, points_per_group=2)
    for (x_first, t_first), (x_second, t_second) in zip(first.seen, second.seen, strict=True):
        assert torch.equal(x_first, x_second)
        assert torch.equal(t_first, t_second)


def test_losses_from_graphs_are_those_without_them(x0):
    tape, options = TapeCapture(), {"points_per_group": 4, "batch_size": 6}  # two sizes of batches: 6 and 3
    plain = heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, **options)
    with use_capture(tape):
        replayed = heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, **options)
    assert torch.equal(replayed.per_image, plain.per_image)
    assert [one.replays for one in tape.tapes] == [6, 6]


def test_another_seed_draws_other_noise(x0):
    a, b = (heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=2, seed=s) for s in (0, 1))
    assert a.mean != b.mean


def test_the_loss_is_the_mean_squared_error_of_the_noise(x0):
    # A model that predicts zero is off by the noise itself, whose mean square is 1.
    many = x0.repeat(40, 1, 1, 1)
    losses = heldout_losses(ScaledInput(0.0), DIFFUSION, many, GROUPS, points_per_group=5)
    assert losses.mean == pytest.approx(1.0, abs=0.02)
    assert losses.num_images == 360


def test_the_mean_weights_groups_by_their_timesteps(x0):
    losses = heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=3)
    low, high = losses.per_group
    assert losses.mean == pytest.approx(0.25 * low + 0.75 * high)


def test_evaluation_runs_in_evaluation_mode_and_gives_the_model_back_as_it_was(x0):
    model = ScaledInput(0.5).train()
    heldout_losses(model, DIFFUSION, x0, GROUPS, points_per_group=1)
    assert not any(model.modes)
    assert model.training


def test_class_labels_follow_their_images(x0):
    labels = torch.arange(9)
    whole = heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=2, model_kwargs={"y": labels})
    pieces = heldout_losses(
        ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=2, model_kwargs={"y": labels}, batch_size=2
    )
    torch.testing.assert_close(whole.per_image, pieces.per_image, rtol=1e-6, atol=0)
    assert whole.per_image[0].argsort().tolist() == list(range(9))  # a larger label is a larger error


def test_the_grid_lies_in_the_middle_of_equal_parts_and_covers_narrow_groups_whole():
    groups = TimestepGroups([0, 2, 102])
    assert timestep_grid(groups, 5) == ((0, 1), (12, 32, 52, 72, 92))


def test_no_image_and_no_timestep_are_refused(x0):
    with pytest.raises(ValueError, match="^x0: "):
        heldout_losses(ScaledInput(0.5), DIFFUSION, x0[:0], GROUPS)
    with pytest.raises(ValueError, match="^points_per_group: "):
        heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=0)


def test_a_paired_difference_has_the_standard_error_of_the_pairs(x0):
    better, worse = (
        heldout_losses(ScaledInput(scale), DIFFUSION, x0, GROUPS, points_per_group=4) for scale in (0.5, 0.0)
    )
    overall, per_group = compare(better, worse)
    gap = better.weighted_per_image() - worse.weighted_per_image()
    assert overall.relative == pytest.approx(better.mean / worse.mean - 1)
    assert overall.standard_error == pytest.approx(float(gap.std()) / 3 / worse.mean)
    assert len(per_group) == 2
    itself, _ = compare(worse, worse)
    assert (itself.relative, itself.standard_error) == (0.0, 0.0)


def test_losses_of_different_draws_are_not_compared(x0):
    a, b = (heldout_losses(ScaledInput(0.5), DIFFUSION, x0, GROUPS, points_per_group=2, seed=s) for s in (0, 1))
    with pytest.raises(ValueError, match="seed"):
        compare(a, b)


class TwoCosts(nn.Module):
    """A product for every sample, and a second one for those below timestep 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)

    def forward(self, x, t):
        h = self.first(x.flatten(1))
        return h[t < 10] @ self.first.weight


def test_sampling_macs_count_each_step_with_what_serves_it():
    macs = sampling_macs(TwoCosts(), torch.tensor([0, 5, 20, 39]), (1, 4, 4))
    assert macs == 4 * 256 + 2 * 256
