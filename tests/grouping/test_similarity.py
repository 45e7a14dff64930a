"""Groups by similarity follow the gradients of the base; groups by difficulty follow its losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdc_fast.diffusion.calibration import Calibration
from tdc_fast.graphs import use_capture
from tdc_fast.grouping import Probes, TaskSimilarity, measure_similarity, probe_losses
from tdc_fast.grouping.similarity import SKETCH_SIZE, gradient_sketch, mean_gradients
from tests.graphs.tape import TapeCapture
from tests.pruning.tiny import RecordedDiffusion


class TwoTasks(nn.Module):
    """Timesteps below 40 train one half of the weights, the others the other half."""

    def __init__(self, size: int = 9000) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.high = nn.Parameter(torch.linspace(-1.0, 1.0, size))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        low = (t < 40).to(x.dtype)[:, None]
        return x * (low * (self.low**2).sum() + (1 - low) * (self.high**2).sum())


DATA = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def two_tasks() -> TaskSimilarity:
    diffusion = RecordedDiffusion(lambda model, x0, t: model(x0, t).square().mean(1))
    return measure_similarity(TwoTasks(), diffusion, DATA, num_probes=20)


def test_timesteps_that_train_the_same_weights_are_similar_and_others_are_not() -> None:
    matrix = two_tasks().matrix
    assert np.allclose(matrix[:8, :8], 1, atol=1e-6) and np.allclose(matrix[8:, 8:], 1, atol=1e-6)
    assert np.abs(matrix[:8, 8:]).max() < 4 * SKETCH_SIZE**-0.5
    assert np.array_equal(matrix, matrix.T)


def test_the_elbow_finds_the_two_tasks() -> None:
    found = two_tasks().groups(max_groups=6)
    assert found.boundaries == (0, 40, 100) and found.strategy == "similarity"


def test_boundaries_by_hand_are_refined_within_their_range() -> None:
    similarity = two_tasks()
    assert similarity.refine([0, 30, 100], within=20).boundaries == (0, 40, 100)
    assert similarity.refine([0, 30, 100], within=5).boundaries == (0, 35, 100)
    assert similarity.refine([0, 70, 100], within=0).boundaries == (0, 70, 100)


def test_a_sketch_keeps_inner_products() -> None:
    torch.manual_seed(0)
    model = nn.Linear(150, 120)
    diffusion = RecordedDiffusion(lambda m, x0, t: (m(x0) * (1 + t[:, None] / 100)).square().mean(1))
    data = [torch.randn(6, 150)]

    def gradient(probe: tuple[int, int]) -> Tensor:
        (losses,) = Calibration(model, diffusion).of(data, probe)
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(model.parameters()))]).double()

    a, b = gradient((0, 10)), gradient((60, 90))
    gradients = mean_gradients(model, diffusion)
    sa, sb = (gradient_sketch(gradients, model, data, probe) for probe in ((0, 10), (60, 90)))
    exact = float(torch.cosine_similarity(a, b, dim=0))
    assert float(torch.cosine_similarity(sa, sb, dim=0)) == pytest.approx(exact, abs=4 * SKETCH_SIZE**-0.5)
    assert float(sa.norm() / a.norm()) == pytest.approx(1, abs=4 * SKETCH_SIZE**-0.5)


def test_the_model_is_left_as_it_was_and_the_measure_repeats() -> None:
    model = TwoTasks().train()
    model.low.requires_grad_(False)
    diffusion = RecordedDiffusion(lambda m, x0, t: m(x0, t).square().mean(1))
    first = measure_similarity(model, diffusion, DATA, num_probes=4)
    assert np.array_equal(first.matrix, measure_similarity(model, diffusion, DATA, num_probes=4).matrix)
    assert model.training and not model.low.requires_grad and model.high.requires_grad and model.high.grad is None


def test_a_gradient_of_zero_is_refused() -> None:
    diffusion = RecordedDiffusion(lambda m, x0, t: m(x0, t).sum(1) * 0)
    with pytest.raises(ValueError, match=r"model.*norm 0.0 at timesteps \(0, 25\)"):
        measure_similarity(TwoTasks(), diffusion, DATA, num_probes=4)


def test_a_saved_similarity_is_read_back_and_a_damaged_one_named(tmp_path) -> None:
    similarity = two_tasks()
    path = tmp_path / "similarity.json"
    similarity.save(path)
    again = TaskSimilarity.load(path)
    assert again.probes == similarity.probes and np.allclose(again.matrix, similarity.matrix, atol=1e-6)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="similarity.json"):
        TaskSimilarity.load(path)


def test_similarity_and_losses_from_graphs_are_those_without_them() -> None:
    torch.manual_seed(0)
    model, tape = nn.Linear(3, 3), TapeCapture()
    diffusion = RecordedDiffusion(lambda m, x0, t: (m(x0) * (1 + t[:, None] / 100)).square().mean(1))
    data = [torch.randn(6, 3) for _ in range(2)]

    def measured():
        similarity = measure_similarity(model, diffusion, data, num_probes=4, max_batches=2)
        return similarity.matrix, probe_losses(model, Probes.evenly(100, 4), diffusion, data)

    plain = measured()
    with use_capture(tape):
        replayed = measured()
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(replayed, plain, strict=True))
    assert [one.replays for one in tape.tapes] == [6, 6]


def test_probe_losses_are_the_means_over_each_interval() -> None:
    diffusion = RecordedDiffusion(lambda m, x0, t: t.double())
    losses = probe_losses(nn.Linear(1, 1), Probes.evenly(100, 4), diffusion, [torch.zeros(50, 1)])
    assert losses == pytest.approx([12, 37, 62, 87], abs=1)


def test_probes_cover_all_timesteps() -> None:
    assert Probes.evenly(10, 3).edges == (0, 3, 6, 10)
    assert Probes.evenly(10, 3).nearest_cuts([0, 1, 10]) == (0, 1, 3)
    assert Probes.evenly(100, 4).nearest_cuts([0, 97, 98, 100]) == (0, 2, 3, 4)
    for count in (0, 11):
        with pytest.raises(ValueError, match="num_probes"):
            Probes.evenly(10, count)
    with pytest.raises(ValueError, match="boundaries"):
        Probes.evenly(10, 2).nearest_cuts([0, 2, 4, 10])
