"""Drawing samples batch after batch, from a graph: the images are those of the steps as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdc_fast.diffusion import SamplingLoop, create_diffusion, sample
from tdc_fast.graphs import use_capture
from tests.graphs.tape import TapeCapture


class Denoiser(nn.Module):
    """Depends on every argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, y=None):
        shift = 0 if y is None else y.view(-1, 1, 1, 1) * 0.1
        return x * self.weight + t.view(-1, 1, 1, 1) / 100 + shift


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm++2m", 0.0)])
def test_a_loop_from_graphs_draws_what_it_draws_without_them(sampler, eta):
    diffusion, model, tape = create_diffusion(50), Denoiser(), TapeCapture()

    def draw():
        loop = SamplingLoop(diffusion, model, sampler=sampler, steps=6, eta=eta)
        generator, drawn = torch.Generator().manual_seed(1), []
        for count, label in ((3, 1), (3, 2), (2, 3)):  # the last batch is smaller: a graph of its own
            labels = {"y": torch.full((count,), label)}
            drawn.append(loop.draw((count, 1, 4, 4), generator=generator, model_kwargs=labels))
        return torch.cat(drawn)

    plain = draw()
    with use_capture(tape):
        assert torch.equal(draw(), plain)
    assert [one.replays for one in tape.tapes] == [2 * 6 - 2, 6 - 2]
    assert plain.unique().numel() > 30


def test_a_single_batch_is_drawn_as_by_a_loop():
    diffusion, model = create_diffusion(50), Denoiser()
    one = sample(diffusion, model, (2, 1, 4, 4), steps=5, generator=torch.Generator().manual_seed(0))
    loop = SamplingLoop(diffusion, model, steps=5)
    assert torch.equal(one, loop.draw((2, 1, 4, 4), generator=torch.Generator().manual_seed(0)))
