from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tdc_fast.diffusion.gaussian import discretized_gaussian_log_likelihood, normal_kl


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_of_two_normals_is_the_closed_form():
    mean1, mean2, scale1, scale2 = (draw(50, seed=s) for s in range(4))
    expected = kl_divergence(Normal(mean1, (scale1 / 2).exp()), Normal(mean2, (scale2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, scale1, mean2, scale2), expected)


@pytest.mark.parametrize(("mean", "log_scale"), list(itertools.product([-1.2, 0.0, 0.4, 0.99], [-5.0, -3.0, 0.0])))
def test_the_probabilities_of_all_256_pixels_sum_to_one(mean, log_scale):
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_probability = discretized_gaussian_log_likelihood(
        pixels, torch.full_like(pixels, mean), torch.full_like(pixels, log_scale)
    )
    assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_a_pixels_probability_is_the_normals_mass_around_it():
    pixels = torch.arange(1, 255, dtype=torch.float64) / 127.5 - 1
    normal = Normal(torch.tensor(0.1, dtype=torch.float64), 0.2)
    expected = normal.cdf(pixels + 1 / 255) - normal.cdf(pixels - 1 / 255)
    ours = discretized_gaussian_log_likelihood(
        pixels, normal.mean.expand_as(pixels), normal.scale.log().expand_as(pixels)
    )
    # The published numbers use an approximate normal distribution function, off by less than 3e-4.
    torch.testing.assert_close(ours.exp(), expected, rtol=0, atol=3e-4)


def test_an_end_pixel_has_the_whole_tail_to_the_approximations_accuracy():
    mean = torch.linspace(-1.9, 1.9, 200, dtype=torch.float64)
    normal = Normal(mean, 0.3)
    log_scale = torch.full_like(mean, 0.3).log()
    bottom = discretized_gaussian_log_likelihood(-torch.ones_like(mean), mean, log_scale)
    top = discretized_gaussian_log_likelihood(torch.ones_like(mean), mean, log_scale)
    edge = torch.tensor(1 - 1 / 255, dtype=torch.float64)
    torch.testing.assert_close(bottom.exp(), normal.cdf(-edge), rtol=0, atol=3e-4)
    torch.testing.assert_close(top.exp(), 1 - normal.cdf(edge), rtol=0, atol=3e-4)
