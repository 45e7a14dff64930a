"""Classifier-free guidance: the formula, and what a guided denoiser asks of its model."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.diffusion import GuidedDenoiser
from tdc_fast.diffusion.guidance import guide


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
