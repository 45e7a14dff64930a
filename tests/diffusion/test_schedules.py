from __future__ import annotations

import math

import numpy as np
import pytest

from tdc_fast.diffusion import create_diffusion, named_betas


def test_the_linear_schedule_runs_from_1e_4_to_2e_2_at_a_thousand_steps():
    betas = named_betas("linear", 1000)
    assert betas.dtype == np.float64
    assert betas[0] == 1e-4 and betas[-1] == pytest.approx(0.02, rel=1e-15)
    np.testing.assert_allclose(np.diff(betas), np.diff(betas)[0], rtol=1e-9)


@pytest.mark.parametrize("steps", [100, 4000])
def test_the_linear_schedule_destroys_the_same_signal_at_any_length(steps):
    assert named_betas("linear", steps).sum() == pytest.approx(named_betas("linear", 1000).sum(), rel=1e-12)


@pytest.mark.parametrize("steps", [50, 1000])
def test_the_cosine_schedule_follows_the_squared_cosine_until_the_cap(steps):
    betas = named_betas("cosine", steps)
    target = [math.cos((s / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for s in range(steps + 1)]
    followed = np.cumprod(1 - betas)[:-1]
    np.testing.assert_allclose(followed, np.array(target[1:-1]) / target[0], rtol=1e-8)
    assert betas[-1] == 0.999 == betas.max()


def test_decibels_are_ten_log10_of_signal_over_noise_power():
    diffusion = create_diffusion(1000, noise_schedule="cosine")
    decibels = diffusion.snr_db()
    alpha_bar = diffusion.alphas_cumprod
    np.testing.assert_allclose(10 ** (decibels / 10), alpha_bar / (1 - alpha_bar), rtol=1e-9)
    assert (np.diff(decibels) < 0).all()


@pytest.mark.parametrize(
    ("name", "steps", "argument"), [("sqrt", 10, "noise_schedule"), ("linear", 0, "num_timesteps")]
)
def test_what_is_no_schedule_is_refused_by_name(name, steps, argument):
    with pytest.raises(ValueError, match=argument):
        named_betas(name, steps)
