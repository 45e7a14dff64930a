"""Classifier-free guidance: the formula, and what a guided denoiser asks of its model."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.diffusion import GuidedDenoiser, SamplingLoop, create_diffusion
from tdc_fast.diffusion.guidance import guide
from tdc_fast.graphs import use_capture
from tdc_fast.routing import TimestepGroups
from tests.graphs.tape import TapeCapture

GROUPS = TimestepGroups([0, 10, 25, 40])


class ByLabel(torch.nn.Module):
    """Shrinks its input by the label, and notes the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t, y):
        self.seen.append(len(x))
        return x * (0.02 * y).view(-1, 1, 1, 1)


@pytest.mark.parametrize("channels", [3, 6])  # with and without a learned variance
def test_the_prediction_moves_away_from_the_one_for_no_class_and_the_variance_stays(channels):
    output, unconditional = torch.randn(2, 4, channels, 2, 2, dtype=torch.float64).unbind()
    scales = torch.tensor([1.0, 0.0, 3.5, 2.0], dtype=torch.float64)
    moved = guide(output, unconditional, scales - 1, 3)
    s = scales.view(-1, 1, 1, 1)
    torch.testing.assert_close(moved[:, :3], s * output[:, :3] + (1 - s) * unconditional[:, :3])
    assert torch.equal(moved[:, 3:], output[:, 3:])
    assert torch.equal(guide(output, output, scales - 1, 3), output)


def test_both_halves_are_one_batch_and_the_second_has_no_class():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x, t, y):
            seen.append((len(x), t.tolist(), y.tolist()))
            return y.view(-1, 1, 1, 1) * x

    x = torch.ones(2, 1, 2, 2)
    out = GuidedDenoiser(Model(), 3.0, null_class=10)(x, torch.tensor([4, 7]), torch.tensor([1, 2]))
    assert seen == [(4, [4, 7, 4, 7], [1, 2, 10, 10])]
    assert out[:, 0, 0, 0].tolist() == [1 + 2 * (1 - 10), 2 + 2 * (2 - 10)]


def test_every_group_has_its_own_scale():
    guided = GuidedDenoiser(ByLabel(), (1.0, 0.0, 3.5), 10, GROUPS)
    x, t, y = torch.ones(6, 1, 2, 2), torch.tensor([0, 9, 10, 24, 25, 39]), torch.tensor([1, 2, 3, 4, 5, 6])
    of_class, of_none = 0.02 * y, torch.tensor(0.02 * 10)
    scale = torch.tensor([1.0, 1.0, 0.0, 0.0, 3.5, 3.5])
    torch.testing.assert_close(guided(x, t, y)[:, 0, 0, 0], scale * of_class + (1 - scale) * of_none)
    assert [guided.guides(step) for step in (0, 9, 10, 24, 25, 39)] == [False, False, True, True, True, True]


def test_steps_with_a_scale_of_one_take_half_the_batch_and_give_the_same_images():
    diffusion = create_diffusion(40, noise_schedule="cosine")
    guided = GuidedDenoiser(ByLabel(), (1.0, 4.0, 1.0), 10, GROUPS)
    y = torch.tensor([1, 2, 3])

    def draw(model):
        loop = SamplingLoop(diffusion, model, sampler="ddim", steps=8)
        return loop.draw((3, 1, 2, 2), generator=torch.Generator().manual_seed(0), model_kwargs={"y": y})

    images = draw(guided)
    visited = [35, 30, 25, 20, 15, 10, 5, 0]
    assert guided.model.seen == [6 if 10 <= t < 25 else 3 for t in visited]
    always = draw(lambda x, t, y: guided(x, t, y))  # no step knows that it could do with half
    torch.testing.assert_close(images, always, rtol=0, atol=0)
    tape = TapeCapture()
    with use_capture(tape):
        assert torch.equal(draw(guided), images)
    assert len(tape.tapes) == 2 and tape.replays == 8 - 2 * 2  # a graph with guidance and one without


@pytest.mark.parametrize(
    ("scale", "groups", "said"),
    [
        ((1.0, 2.0), GROUPS, "expected one number, or 3 of them: one per group from low to high"),
        ((1.0, 2.0), None, "expected one number, as there are no groups of timesteps"),
    ],
)
def test_a_list_of_another_length_than_the_groups_is_refused(scale, groups, said):
    with pytest.raises(ValueError, match=r"guidance_scale: got \(1.0, 2.0\); " + said):
        GuidedDenoiser(ByLabel(), scale, 10, groups)
