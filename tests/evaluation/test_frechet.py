"""The Fréchet distance against its closed form, the extractors, and the floors."""

from __future__ import annotations

import math

import pytest
import torch

from tdc_fast.data.pixels import to_uint8
from tdc_fast.evaluation.features import PrecomputedFeatures, RandomConvFeatures, extract
from tdc_fast.evaluation.frechet import DistanceSpread, frechet_distance, real_floors


def _with_moments(mean: torch.Tensor, factor: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` points whose sample mean is `mean` and whose sample covariance is factor @ factor.T, exactly."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    raw -= raw.mean(dim=0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return white @ factor.T + mean


def test_distance_of_gaussians_equals_the_closed_form():
    # Diagonal covariances commute: |m1 - m2|^2 + sum (s1 - s2)^2.
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    sd_a, sd_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 1.0, 0.25]).double()
    a = _with_moments(mean_a, sd_a.diag(), 50, 0)
    b = _with_moments(mean_b, sd_b.diag(), 80, 1)
    expected = float((mean_a - mean_b).square().sum() + (sd_a - sd_b).square().sum())
    assert frechet_distance(a, b, PrecomputedFeatures(3)) == pytest.approx(expected, rel=1e-9)


def test_distance_of_gaussians_with_covariances_that_do_not_commute():
    first = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double()
    second = torch.tensor([[1.0, 0.0], [-0.5, 1.5]]).double()
    a = _with_moments(torch.zeros(2).double(), first, 40, 0)
    b = _with_moments(torch.ones(2).double(), second, 40, 1)
    cov_a, cov_b = first @ first.T, second @ second.T
    # 2x2: trace((AB)^(1/2)) = sqrt(trace(AB) + 2 sqrt(det(AB))).
    root = math.sqrt(float((cov_a @ cov_b).trace()) + 2 * math.sqrt(float(torch.linalg.det(cov_a @ cov_b))))
    expected = 2.0 + float(cov_a.trace() + cov_b.trace()) - 2 * root
    assert frechet_distance(a, b, PrecomputedFeatures(2)) == pytest.approx(expected, rel=1e-9)


def test_distance_does_not_depend_on_the_batch_size_and_is_zero_for_a_set_against_itself():
    a = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
    b = torch.randn(29, 4, generator=torch.Generator().manual_seed(1))
    extractor = PrecomputedFeatures(4)
    assert frechet_distance(a, b, extractor, batch_size=5) == pytest.approx(frechet_distance(a, b, extractor), rel=1e-9)
    assert frechet_distance(a, a, extractor) == pytest.approx(0.0, abs=1e-6)


def test_a_single_image_has_no_covariance():
    with pytest.raises(ValueError, match="^b: "):
        frechet_distance(torch.zeros(5, 2), torch.zeros(1, 2), PrecomputedFeatures(2))


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 33, 33), (4, 3, 4, 4)])
def test_random_features_take_any_image_and_are_the_same_each_time(shape):
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    first = extract(images, RandomConvFeatures(shape[1]))
    torch.manual_seed(6)
    second = extract(images, RandomConvFeatures(shape[1]))
    assert first.shape == (shape[0], 64)
    assert torch.equal(first, second)
    assert first.isfinite().all()


def test_extract_refuses_what_is_no_uint8_image():
    with pytest.raises(ValueError, match="uint8"):
        extract(torch.zeros(2, 1, 8, 8), RandomConvFeatures(1))


def test_to_uint8_rounds_and_clips():
    images = torch.tensor([-2.0, -1.0, 0.0, 1 / 127.5 - 1 + 0.001, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 128, 1, 255, 255]


def test_floors_state_their_n_and_halves_lie_above_the_bootstrap():
    features = torch.randn(120, 6, generator=torch.Generator().manual_seed(0)).double()
    bootstrap, halves = real_floors(features, bootstrap_n=600, repetitions=4)
    assert (bootstrap.n, halves.n) == (600, 60)
    assert len(bootstrap.values) == len(halves.values) == 4
    assert 0 < max(bootstrap.values) < min(halves.values)
    assert real_floors(features, bootstrap_n=600, repetitions=4)[0] == bootstrap


def test_spread_is_the_standard_deviation_over_draws():
    assert DistanceSpread(5000, (1.0, 3.0)).standard_deviation == pytest.approx(math.sqrt(2))
    assert DistanceSpread(5000, (1.0,)).to_json()["sd"] is None
