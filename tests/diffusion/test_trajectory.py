"""A sampler's way known in advance: its weights are those of the single steps, and its bits those of any batch."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from tdc_fast.diffusion import Diffusion, SamplingLoop, create_diffusion, ddim_step, ddpm_step, dpmpp_2m_step
from tdc_fast.diffusion.trajectory import Trajectory
from tdc_fast.diffusion.updates import advance

SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm++2m", 0.0)]


def model(x, t):
    out = torch.tanh(x) * (0.5 + t.to(x).view(-1, 1, 1, 1) / 1000)
    return torch.cat([out, 0.3 * x], dim=1)


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, None])
def test_its_steps_are_the_samplers_own(sampler, eta, steps):
    diffusion = create_diffusion(30, noise_schedule="cosine", learn_sigma=True)
    way = Trajectory.plan(diffusion, sampler, steps, eta=eta)
    kept = tuple(reversed(way.timesteps.tolist()))
    process = diffusion if len(kept) == 30 else diffusion.with_timesteps(kept)
    x = expected = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x0, history = torch.zeros_like(x), None
    for index in range(len(way)):
        noise, t = torch.randn_like(x), torch.full((2,), len(way) - 1 - index)
        output = model(x, way.timesteps[index].repeat(2))
        own = way.weights[:, index : index + 1].repeat(1, 2)
        x, x0 = advance(diffusion, output, x, own, noise=noise, last_x0=x0)
        if sampler == "ddpm":
            expected = ddpm_step(process, model, expected, t, noise=noise)
        elif sampler == "ddim":
            expected = ddim_step(process, model, expected, t, eta=eta, noise=noise)
        else:
            expected, history = dpmpp_2m_step(process, model, expected, t, history=history)
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    assert way.draws_noise == (sampler == "ddpm" or eta > 0) and way.remembers == (sampler == "dpm++2m")


@pytest.mark.parametrize(("learn_sigma", "predict_x0"), list(itertools.product([False, True], [False, True])))
def test_a_samples_bits_do_not_depend_on_the_batch_nor_on_what_the_others_do(learn_sigma, predict_x0):
    diffusion = create_diffusion(50, learn_sigma=learn_sigma, predict_xstart=predict_x0)
    ways = [Trajectory.plan(diffusion, sampler, 20, eta=eta) for sampler, eta in SAMPLERS]
    weights = torch.stack([way.weights[:, index] for index, way in enumerate(ways * 4)], dim=1)
    x, noise, last = (torch.randn(16, 1, 3, 5) for _ in range(3))
    output = torch.randn(16, 2 if learn_sigma else 1, 3, 5)
    together = advance(diffusion, output, x, weights, noise=noise, last_x0=last)
    for first, count in itertools.product(range(0, 16, 3), (1, 2, 7)):
        rows = slice(first, first + count)
        part = advance(
            diffusion, output[rows], x[rows], weights[:, rows], noise=noise[rows], last_x0=last[rows]
        )  # fmt: skip
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, together, strict=True))


@pytest.mark.parametrize("eta", [-0.1, float("nan")])
def test_an_eta_that_is_no_amount_of_noise_is_refused(eta):
    with pytest.raises(ValueError, match="eta: got"):
        SamplingLoop(create_diffusion(20), lambda x, t: x, eta=eta)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_eta_is_refused_by_a_sampler_that_has_no_such_setting(sampler):
    with pytest.raises(ValueError, match=re.escape(f"eta: got 0.5; expected 0 with the sampler {sampler}")):
        Trajectory.plan(create_diffusion(20), sampler, eta=0.5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_it_is_in_host_memory_whatever_the_default_device(sampler):
    expected = Trajectory.plan(create_diffusion(30), sampler, 5)
    with torch.device("meta"):
        way = Trajectory.plan(create_diffusion(30), sampler, 5)
    assert torch.equal(way.timesteps, expected.timesteps) and torch.equal(way.weights, expected.weights)


@pytest.mark.filterwarnings("error")
def test_noise_is_not_predicted_where_nothing_of_x0_is_left():
    betas = np.append(np.linspace(0.01, 0.2, 9), 1.0)
    with pytest.raises(ValueError, match="steps: got 'timestep 9, where alpha_bar is 0'; expected a model"):
        Trajectory.plan(Diffusion(betas), "ddim")
    assert len(Trajectory.plan(Diffusion(betas), "ddim", 5)) == 5  # from timestep 8 on
    for prediction, sampler in itertools.product(("x0", "v"), ("ddpm", "ddim", "dpm++2m")):
        drawn = SamplingLoop(Diffusion(betas, prediction=prediction), lambda x, t: x / 2, sampler=sampler).draw((2, 1))
        assert drawn.isfinite().all()
