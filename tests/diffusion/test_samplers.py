from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tdc_fast.diffusion import (
    Diffusion,
    Dpm2mHistory,
    create_diffusion,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    named_betas,
    sample,
)
from tdc_fast.diffusion.respacing import spaced_timesteps
from tdc_fast.diffusion.samplers import sampling_steps

SAMPLERS = ["ddpm", "ddim", "dpm++2m"]


def full(t: int, batch: int) -> torch.Tensor:
    return torch.full((batch,), t, dtype=torch.int64)


def propagated(diffusion, model, data, last: int, first: int):
    """Mean and covariance of x after ancestral steps last .. first from the exact marginal: each step is affine in x
    and in the noise, so both maps are read off exactly, without drawing a sample."""
    mean, covariance = data.marginal(last)
    dims = len(mean)
    basis = torch.eye(dims, dtype=torch.float64)
    x = torch.cat([mean[None], mean + basis, mean.expand(dims, -1)])
    noise = torch.cat([torch.zeros(1 + dims, dims, dtype=torch.float64), basis])
    for t in range(last, first - 1, -1):
        out = ddpm_step(diffusion, model, x, full(t, len(x)), noise=noise, clip_denoised=False)
        state, drawn = out[1 : 1 + dims] - out[0], out[1 + dims :] - out[0]
        mean, covariance = out[0], state.T @ covariance @ state + drawn.T @ drawn
        x = torch.cat([mean[None], mean + basis, mean.expand(dims, -1)])
    return mean, covariance


@pytest.mark.parametrize("spacing", ["ddim20", "200", "7"])
@pytest.mark.parametrize(("variance", "spread"), [("fixed_large", 1.0), ("fixed_small", 0.0)])
def test_ancestral_sampling_is_exact_where_its_fixed_variance_is(gaussian_data, spacing, variance, spread):
    """Unit-variance data make beta the true reverse variance, a single point the posterior's: at any count of steps."""
    base = Diffusion(named_betas("cosine", 200), variance=variance)
    diffusion, data = base.respaced(spacing), gaussian_data(base, covariance=spread)
    marginals = gaussian_data(diffusion, covariance=spread)
    mean, covariance = propagated(diffusion, data.denoiser, marginals, diffusion.num_timesteps - 1, 1)
    expected_mean, expected_covariance = marginals.marginal(0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(covariance, expected_covariance, rtol=1e-6, atol=1e-9)


def test_ancestral_sampling_with_the_true_variance_learned_is_exact_for_any_isotropic_gaussian(gaussian_data):
    base = Diffusion(named_betas("linear", 200), variance="learned_range")
    diffusion, data, spread = base.respaced("11"), gaussian_data(base, covariance=0.1), 0.1
    before, now = diffusion.alphas_cumprod_prev, diffusion.alphas_cumprod
    variance = (before * spread + 1 - before) * diffusion.betas / (now * spread + 1 - now)
    low, high = diffusion.posterior_log_variance_clipped, diffusion.log_betas
    value = torch.zeros(200, dtype=torch.float64)
    fraction = (np.log(variance[1:]) - low[1:]) / (high[1:] - low[1:])
    value[list(diffusion.timestep_map[1:])] = torch.from_numpy(2 * fraction - 1)

    def model(x, t):
        return torch.cat([data.denoiser(x, t), value[t].view(-1, 1).expand_as(x)], dim=1)

    marginals = gaussian_data(diffusion, covariance=spread)
    mean, covariance = propagated(diffusion, model, marginals, 10, 1)
    torch.testing.assert_close(mean, marginals.marginal(0)[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(covariance, marginals.marginal(0)[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_approaches_any_gaussian_with_many_steps(gaussian_data, variance):
    diffusion = Diffusion(named_betas("cosine", 1000), variance=variance)
    data = gaussian_data(diffusion)
    mean, covariance = propagated(diffusion, data.denoiser, data, 900, 0)
    torch.testing.assert_close(mean, data.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance, data.covariance, rtol=0.02, atol=1e-3)


def order_of_convergence(step, gaussian_data) -> float:
    """Slope of log error against log step size, along the exact probability flow from step 900 to 100."""
    diffusion = Diffusion(named_betas("linear", 1000))
    data = gaussian_data(diffusion)
    start = data.marginal(900)[0] + torch.tensor([[1.0, -0.5], [0.2, 0.9]], dtype=torch.float64)
    exact = data.flow(start, 900, 100)
    errors = []
    for steps in (20, 80):
        x, history = start, None
        for t in range(900, 100, -800 // steps):
            x, history = step(diffusion, data.denoiser, x, full(t, 2), full(t - 800 // steps, 2), history)
        errors.append((x - exact).norm().item())
    return float(np.log(errors[0] / errors[1]) / np.log(4))


def test_ddim_converges_to_the_probability_flow_at_first_order(gaussian_data):
    def step(diffusion, model, x, t, t_next, history):
        return ddim_step(diffusion, model, x, t, t_next, clip_denoised=False), None

    assert order_of_convergence(step, gaussian_data) == pytest.approx(1, abs=0.15)


def test_dpm_solver_converges_to_the_probability_flow_at_second_order(gaussian_data):
    def step(diffusion, model, x, t, t_next, history):
        return dpmpp_2m_step(diffusion, model, x, t, t_next, history=history, clip_denoised=False)

    assert order_of_convergence(step, gaussian_data) == pytest.approx(2, abs=0.25)


def test_dpm_solvers_first_step_and_its_step_to_the_clean_sample_are_ddims(gaussian_data):
    """At first order both are the exponential integrator of the same flow."""
    diffusion = Diffusion(named_betas("cosine", 100))
    data = gaussian_data(diffusion)
    x = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    first, history = dpmpp_2m_step(diffusion, data.denoiser, x, full(80, 1), full(40, 1), clip_denoised=False)
    torch.testing.assert_close(
        first, ddim_step(diffusion, data.denoiser, x, full(80, 1), full(40, 1), clip_denoised=False)
    )
    last, _ = dpmpp_2m_step(diffusion, data.denoiser, first, full(40, 1), full(-1, 1), history=history)
    torch.testing.assert_close(last, ddim_step(diffusion, data.denoiser, first, full(40, 1), full(-1, 1)))


def test_ddim_at_eta_one_is_ancestral_sampling_with_the_small_variance():
    diffusion = Diffusion(named_betas("cosine", 50), variance="fixed_small")
    x, noise = (torch.randn(49, 2, dtype=torch.float64) for _ in range(2))
    t = torch.arange(1, 50)
    one = ddim_step(diffusion, lambda x, t: 0.3 * x, x, t, eta=1.0, noise=noise)
    torch.testing.assert_close(one, ddpm_step(diffusion, lambda x, t: 0.3 * x, x, t, noise=noise))


def test_ddims_noise_grows_in_proportion_to_eta():
    diffusion = Diffusion(named_betas("cosine", 50))
    x, noise = (torch.randn(49, 2, dtype=torch.float64) for _ in range(2))
    t = torch.arange(1, 50)

    def drawn(eta):
        with_noise, without = (
            ddim_step(diffusion, lambda x, t: 0.3 * x, x, t, eta=eta, noise=n) for n in (noise, 0 * noise)
        )
        return with_noise - without

    torch.testing.assert_close(drawn(0.25), drawn(1.0) / 4)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("ddim", 100), ("dpm++2m", 25)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_sampler_draws_the_gaussian_it_was_given_the_denoiser_of(gaussian_data, sampler, steps, schedule):
    diffusion = Diffusion(named_betas(schedule, 1000), variance="fixed_small")
    data = gaussian_data(diffusion)
    draws = sample(
        diffusion,
        data.denoiser,
        (8000, 2),
        sampler=sampler,
        steps=steps,
        generator=torch.Generator().manual_seed(0),
        clip_denoised=False,
    ).double()
    torch.testing.assert_close(draws.mean(0), data.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(draws.T), data.covariance, rtol=0.08, atol=0.005)


def image_model(x, t):
    """Every sample sees only itself and its own timestep."""
    return torch.tanh(x) * (0.5 + t.to(x).view(-1, 1, 1, 1) / 1000)


def one_step(name, diffusion, x, t, t_next, noise, history):
    if name == "ddpm":
        return ddpm_step(diffusion, image_model, x, t, noise=noise), history
    if name == "ddim":
        return ddim_step(diffusion, image_model, x, t, t_next, eta=0.7, noise=noise), history
    return dpmpp_2m_step(diffusion, image_model, x, t, t_next, history=history)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_of_samples_at_different_steps_equals_each_on_its_own(name):
    """Serving: samples start late, stride differently and finish at different times, in one batch."""
    diffusion = create_diffusion(100, noise_schedule="cosine")
    plans = [[(t, t - 1) for t in range(3, -1, -1)], [(60, 40), (40, 5), (5, -1)], [(99, 98), (98, 97)]]
    if name == "ddpm":
        plans[1] = [(60, 59), (59, 58), (58, 57)]
    delays, rounds = [0, 2, 1], 6
    draw = torch.Generator().manual_seed(0)
    starts = torch.randn(3, 1, 2, 2, generator=draw)
    noise = torch.randn(rounds, 3, 1, 2, 2, generator=draw)

    x, history = starts, Dpm2mHistory.empty(starts)
    for turn in range(rounds):
        # A sample that waits for its start, or is done, stands at -1.
        moves = [
            plan[turn - delay] if 0 <= turn - delay < len(plan) else (-1, -1)
            for plan, delay in zip(plans, delays, strict=True)
        ]
        t, t_next = torch.tensor(moves).T
        x, history = one_step(name, diffusion, x, t, t_next, noise[turn], history)

    for index, (plan, delay) in enumerate(zip(plans, delays, strict=True)):
        alone, own = starts[index : index + 1], None
        for step, (t, t_next) in enumerate(plan):
            drawn = noise[step + delay, index : index + 1]
            alone, own = one_step(name, diffusion, alone, full(t, 1), full(t_next, 1), drawn, own)
        torch.testing.assert_close(x[index : index + 1], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_finished_sample_comes_back_bit_for_bit_even_if_it_is_nan(name):
    diffusion = create_diffusion(100)
    x = torch.randn(3, 1, 2, 2)
    x[1] = float("nan")
    moved, history = one_step(
        name, diffusion, x, torch.tensor([-1, -1, 5]), torch.tensor([-1, -1, 4]), x * 0 + 1, Dpm2mHistory.empty(x)
    )
    assert torch.equal(moved[0], x[0]) and moved[1].isnan().all()
    assert not torch.equal(moved[2], x[2]) and moved[2].isfinite().all()
    assert history.t[0] == -1


def test_histories_follow_their_samples_through_joining_and_leaving_batches():
    diffusion = create_diffusion(100)
    x = torch.randn(4, 1, 2, 2)
    x, history = one_step("dpm++2m", diffusion, x, full(50, 4), full(30, 4), None, None)
    together, _ = one_step("dpm++2m", diffusion, x, full(30, 4), full(20, 4), None, history)
    index = torch.tensor([2, 0])
    joined = Dpm2mHistory.concat([history.select(index), Dpm2mHistory.empty(x[:1])])
    moved, _ = one_step("dpm++2m", diffusion, torch.cat([x[index], x[:1]]), full(30, 3), full(20, 3), None, joined)
    torch.testing.assert_close(moved[:2], together[index])
    assert not torch.allclose(moved[2], together[0])  # the newcomer has no history: first order


def test_a_paused_sample_continues_at_second_order():
    diffusion = create_diffusion(100)
    start = torch.randn(1, 1, 2, 2)
    plain, paused, history, own = start, start, None, None
    for t, t_next in [(50, 30), (30, 20), (20, 10)]:
        plain, history = one_step("dpm++2m", diffusion, plain, full(t, 1), full(t_next, 1), None, history)
        paused, own = one_step("dpm++2m", diffusion, paused, full(t, 1), full(t_next, 1), None, own)
        paused, own = one_step("dpm++2m", diffusion, paused, full(-1, 1), full(-1, 1), None, own)
    assert torch.equal(plain, paused)


def test_a_new_sample_in_the_place_of_a_finished_one_starts_without_its_history():
    diffusion = create_diffusion(100)
    x = torch.randn(1, 1, 2, 2)
    _, stale = one_step("dpm++2m", diffusion, x, full(10, 1), full(5, 1), None, None)
    for t in (10, 50):
        moved, _ = one_step("dpm++2m", diffusion, x, full(t, 1), full(t - 5, 1), None, stale)
        assert torch.equal(moved, one_step("dpm++2m", diffusion, x, full(t, 1), full(t - 5, 1), None, None)[0])


@pytest.mark.parametrize(("name", "learn_sigma"), list(itertools.product(SAMPLERS, [False, True])))
def test_sampling_is_reproducible_bounded_and_leaves_no_graph(name, learn_sigma):
    diffusion = create_diffusion(100, noise_schedule="cosine", learn_sigma=learn_sigma)
    weight = torch.nn.Parameter(torch.tensor(0.5))

    def model(x, t, y):
        output = weight * x + y.view(-1, 1, 1, 1)
        return torch.cat([output, torch.zeros_like(output)], 1) if learn_sigma else output

    def run(seed):
        labels = {"y": torch.tensor([0.0, 0.1, 0.2])}
        generator = torch.Generator().manual_seed(seed)
        options = {"sampler": name, "steps": 10, "generator": generator, "model_kwargs": labels}
        return sample(diffusion, model, (3, 1, 4, 4), eta=0.5 if name == "ddim" else 0, **options)

    x = run(0)
    assert torch.equal(x, run(0)) and not torch.equal(x, run(1))
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last) and not x.requires_grad
    assert x.abs().max() <= 1


def test_ddim_draws_no_noise_after_the_first():
    generator = torch.Generator().manual_seed(0)
    sample(create_diffusion(50), image_model, (2, 1, 2, 2), steps=5, generator=generator)
    reference = torch.Generator().manual_seed(0)
    torch.randn(2, 1, 2, 2, generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_the_steps_visited_suit_the_sampler():
    diffusion = create_diffusion(1000, noise_schedule="cosine")
    assert sampling_steps(diffusion, "ddim", 25) == tuple(range(0, 1000, 40))
    assert sampling_steps(diffusion, "ddpm", 3) == (0, 500, 999)
    assert sampling_steps(diffusion, "ddim") == tuple(range(1000))
    visited = sampling_steps(diffusion, "dpm++2m", 20)
    # Beyond a half log SNR of -5.1 the predicted x0 is amplified noise.
    assert visited[0] == 0 and 950 < visited[-1] < 999
    np.testing.assert_allclose(np.diff(diffusion.snr_db()[list(visited)]), -5, atol=1.5)
    assert sampling_steps(diffusion, "dpm++2m") == tuple(range(visited[-1] + 1))


def test_steps_are_those_of_the_spacings_of_the_same_count():
    diffusion = create_diffusion(100)
    for count in range(1, 101):  # some of their positions are halves, which improved-diffusion reaches by a sum
        assert sampling_steps(diffusion, "ddpm", count) == spaced_timesteps(100, count)
        if 100 % count == 0 and count > 1:
            assert sampling_steps(diffusion, "ddim", count) == spaced_timesteps(100, f"ddim{count}")


def test_dpm_solver_starts_where_nothing_is_left_of_x0_if_it_takes_every_step():
    diffusion = create_diffusion(20, predict_v=True)
    assert diffusion.alphas_cumprod[-1] == 0
    assert sampling_steps(diffusion, "dpm++2m", 20) == tuple(range(20))
    assert sampling_steps(diffusion, "dpm++2m", 18) == tuple(range(18))
    assert sampling_steps(diffusion, "dpm++2m", 1) == sampling_steps(diffusion, "dpm++2m")[-1:]


@pytest.mark.parametrize(("name", "schedule"), list(itertools.product(SAMPLERS, ["linear", "cosine"])))
def test_as_many_distinct_steps_are_visited_as_asked_for(name, schedule):
    diffusion = create_diffusion(100, noise_schedule=schedule)
    for steps in (1, 2, 7, 50, 95, 99, 100):
        visited = sampling_steps(diffusion, name, steps)
        assert len(visited) == len(set(visited)) == steps
        assert list(visited) == sorted(visited) and visited[0] >= 0 and visited[-1] < 100


def test_what_cannot_be_sampled_is_refused_by_name():
    diffusion, x = create_diffusion(100), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="sampler"):
        sample(diffusion, image_model, x.shape, sampler="euler")
    with pytest.raises(ValueError, match="steps"):
        sample(diffusion, image_model, x.shape, steps=101)
    for steps in (2.5, True):
        with pytest.raises(ValueError, match=f"steps: got {steps}"):
            sample(diffusion, image_model, x.shape, steps=steps)
    assert sampling_steps(diffusion, "ddim", np.int64(4)) == (0, 25, 50, 75)
    with pytest.raises(ValueError, match="shape: got 3"):
        sample(diffusion, image_model, 3)
    with pytest.raises(ValueError, match="eta: got -1"):
        sample(diffusion, image_model, x.shape, eta=-1)
    with pytest.raises(ValueError, match=r"noise: got 'shape \(1, 1, 2, 2\)'; expected .*\(2, 1, 2, 2\)"):
        sample(diffusion, image_model, x.shape, noise=x[:1])
    with pytest.raises(ValueError, match="noise: got 'shape"):
        ddpm_step(diffusion, image_model, x, torch.tensor([5, 5]), noise=x[:1])
    with pytest.raises(ValueError, match="last_x0: got 'shape"):
        dpmpp_2m_step(diffusion, image_model, x, torch.tensor([5, 5]), history=Dpm2mHistory.empty(x[:1]))
    for eta in (-1, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="eta: got"):
            ddim_step(diffusion, image_model, x, torch.tensor([5, 5]), eta=eta)
    with pytest.raises(ValueError, match="t_next"):
        ddim_step(diffusion, image_model, x, torch.tensor([5, 5]), torch.tensor([5, 4]))
    with pytest.raises(ValueError, match="t_next"):
        ddim_step(diffusion, image_model, x, torch.tensor([5, 5]), torch.tensor([4]))
    with pytest.raises(ValueError, match="^t: "):
        ddpm_step(diffusion, image_model, x, torch.tensor([100, 5]))
