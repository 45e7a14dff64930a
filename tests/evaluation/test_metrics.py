"""Moments, kernel distance, precision and recall and the class score against what their papers define, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tdc_fast.evaluation.class_score import RunningClassScore
from tdc_fast.evaluation.features import PrecomputedFeatures
from tdc_fast.evaluation.frechet import frechet_distance
from tdc_fast.evaluation.manifolds import precision_recall
from tdc_fast.evaluation.mmd import kernel_distance
from tdc_fast.evaluation.moments import Moments, RunningMoments, moments_distance


def _random(count: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _moments(features: torch.Tensor, batch_size: int) -> Moments:
    running = RunningMoments()
    for batch in features.split(batch_size):
        running.update(batch)
    return running.result()


@pytest.mark.parametrize(("count", "batch_size"), [(300, 7), (300, 300), (5, 2), (6, 1)])
def test_moments_of_batches_are_those_of_all_features_and_need_no_more_rows_than_features(count, batch_size):
    features = _random(count, 6, 0) @ _random(6, 6, 1) + 1e6  # far from zero: sums of squares would lose ten digits
    found = _moments(features, batch_size)
    assert found.count == count and len(found.root) <= 6
    torch.testing.assert_close(found.mean, features.mean(dim=0), rtol=1e-15, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(features.T), rtol=1e-8, atol=1e-8)


def test_the_distance_of_singular_covariances_has_all_its_digits():
    # Covariances u u^T and v v^T: trace((cov_a cov_b)^(1/2)) = |u . v|.
    u, v = torch.tensor([1.0, 2.0, 0.0, 1.0]).double(), torch.tensor([0.5, -1.0, 3.0, 0.0]).double()
    a, b = Moments(3, torch.zeros(4).double(), u[None]), Moments(3, torch.ones(4).double(), v[None])
    expected = 4.0 + float(u @ u + v @ v - 2 * (u @ v).abs())
    assert moments_distance(a, b) == pytest.approx(expected, rel=1e-14)
    features = _random(5, 40, 2)  # five images, forty features
    moved = features + 0.25
    assert moments_distance(_moments(features, 2), _moments(moved, 3)) == pytest.approx(40 * 0.0625, rel=1e-12)
    assert moments_distance(_moments(features, 2), _moments(features, 5)) == pytest.approx(0, abs=1e-13)


def test_moments_from_a_stored_covariance_are_those_that_it_was_made_of():
    features = _random(30, 8, 3)
    stored = Moments.from_covariance(features.mean(dim=0).float(), torch.cov(features.T).float())
    other = _moments(_random(25, 8, 4), 25)
    assert moments_distance(stored, other) == pytest.approx(moments_distance(_moments(features, 30), other), rel=1e-5)
    assert stored.count == 0


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.eye(3), "a mean .F,. and a covariance"),
        (torch.full((2, 2), torch.nan), "finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    ],
)
def test_a_matrix_that_is_no_covariance_is_refused(covariance, message):
    with pytest.raises(ValueError, match=message):
        Moments.from_covariance(torch.zeros(2), covariance)


def test_features_that_are_no_numbers_or_too_few_are_refused():
    running = RunningMoments()
    running.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        running.result()
    with pytest.raises(FloatingPointError, match="infinities or NaN"):
        running.update(torch.full((1, 3), torch.inf))
    with pytest.raises(ValueError, match=r"expected \(B, 3\)"):
        running.update(torch.zeros(2, 4))


def _mmd(x: list[torch.Tensor], y: list[torch.Tensor]) -> float:
    """Equation 4 of the paper, pair by pair: the unbiased estimator with k(x, y) = (x . y / F + 1)^3."""

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    own = [sum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return sum(own) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kernel_distance_is_the_unbiased_mmd_of_every_pair():
    x, y = _random(9, 5, 0), _random(9, 5, 1) * 1.5 + 0.3
    found = kernel_distance(x.float(), y.float())
    assert found.values == (pytest.approx(_mmd([*x], [*y]), rel=1e-5),) and found.block_size == 9
    assert found.standard_deviation is None


def test_kernel_distance_of_blocks_is_that_of_the_images_drawn_for_each():
    x, y = _random(11, 4, 2), _random(8, 4, 3)
    found = kernel_distance(x, y, blocks=3, block_size=5, seed=7)
    generator = torch.Generator().manual_seed(7)
    for value in found.values:
        first = torch.randperm(11, generator=generator)[:5]
        second = torch.randperm(8, generator=generator)[:5]
        assert value == pytest.approx(_mmd([*x[first]], [*y[second]]), rel=1e-10)
    assert found.mean == pytest.approx(sum(found.values) / 3) and found.block_size == 5
    assert kernel_distance(x, y).block_size == 8 and len(kernel_distance(x, y).values) == 100


def test_kernel_distance_of_one_distribution_is_as_often_below_zero_as_above():
    values = [kernel_distance(_random(40, 3, 2 * n), _random(40, 3, 2 * n + 1)).mean for n in range(40)]
    assert 8 < sum(value < 0 for value in values) < 32
    assert abs(sum(values) / 40) < 0.1


def test_precision_and_recall_are_the_shares_inside_the_balls_of_the_third_neighbours():
    real, generated = _random(24, 3, 0), _random(20, 3, 1) * 0.8 + 0.4

    def inside(point: torch.Tensor, members: torch.Tensor) -> bool:
        for row, centre in enumerate(members):
            others = sorted(float((centre - other).norm()) for n, other in enumerate(members) if n != row)
            if float((point - centre).norm()) <= others[2]:
                return True
        return False

    found = precision_recall(real.float(), generated.float())
    assert found.precision == sum(inside(point, real) for point in generated) / 20
    assert found.recall == sum(inside(point, generated) for point in real) / 24
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_precision_and_recall_in_pieces_are_those_of_the_whole_table(monkeypatch):
    real, generated = _random(60, 4, 0), _random(50, 4, 1) * 0.8 + 0.4
    whole = precision_recall(real, generated)
    monkeypatch.setattr("tdc_fast.evaluation.manifolds._ROWS_AT_ONCE", 7)
    assert precision_recall(real, generated) == whole
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="^generated: .*more than 3 images"):
        precision_recall(real, generated[:3])


def _score(logits: torch.Tensor, seed: int = 0, batch_size: int = 7) -> RunningClassScore:
    running = RunningClassScore(len(logits), seed)
    for batch in logits.split(batch_size):
        running.update(batch)
    return running


def test_class_score_is_the_divergence_from_the_classes_of_each_tenth():
    logits = _random(43, 6, 0) * 3
    order = torch.randperm(43, generator=torch.Generator().manual_seed(5))
    expected = []
    for part in range(10):
        p = torch.stack([logits[i].softmax(0) for place, i in enumerate(order) if place * 10 // 43 == part])
        q = p.mean(dim=0)
        expected.append(float((p * (p / q).log()).sum(dim=1).mean().exp()))
    found = _score(logits.float(), seed=5).result()
    assert found.values == pytest.approx(expected, rel=1e-5)
    assert found.standard_deviation == pytest.approx(float(torch.tensor(expected).std(correction=0)), rel=1e-4)


def test_class_score_runs_from_one_to_the_number_of_classes():
    assert _score(torch.ones(20, 5)).result().values == pytest.approx([1.0] * 10)
    sure = 1000.0 * torch.eye(2).repeat(4000, 1)  # each tenth has about as many of either class
    assert _score(sure, batch_size=999).result().mean == pytest.approx(2.0, rel=0.01)
    with pytest.raises(ValueError, match="at least 10"):
        RunningClassScore(9)
    with pytest.raises(ValueError, match="all 20"):
        RunningClassScore(20).result()


def test_distances_are_those_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = _random(60, 5, 0) + 1, _random(60, 5, 1) * 1.5
    identity = PrecomputedFeatures(5)
    theirs = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=identity, subsets=2, subset_size=60)  # whole sets, twice
    for metric in (theirs, kernel):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert frechet_distance(x, y, identity) == pytest.approx(float(theirs.compute()), rel=1e-10)
    assert kernel_distance(x, y).mean == pytest.approx(float(kernel.compute()[0]), rel=1e-6)
