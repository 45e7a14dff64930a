from __future__ import annotations

import numpy as np
import pytest
import torch

from tdc_fast.diffusion import Diffusion, create_diffusion, named_betas

VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
T = 60


def process(schedule="cosine", **options) -> Diffusion:
    return Diffusion(named_betas(schedule, T), **options)


def every_step(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0 and x_t (T, *shape) float64, and t = 0 .. T - 1."""
    draw = torch.Generator().manual_seed(0)
    return *(torch.randn(T, *shape, generator=draw, dtype=torch.float64) for _ in range(2)), torch.arange(T)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_marginal_is_what_one_noise_step_after_another_gives(schedule):
    diffusion = process(schedule)
    scale, variance = 1.0, 0.0
    x0, noise, t = every_step(1)
    x_t = diffusion.q_sample(x0, t, noise)
    for step, beta in enumerate(diffusion.betas):
        scale, variance = scale * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        expected = scale * x0[step] + variance**0.5 * noise[step]
        torch.testing.assert_close(x_t[step], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_posterior_is_bayes_rule_on_one_step_and_the_marginal_before_it(schedule):
    diffusion = process(schedule)
    x0, x_t, t = every_step(2)
    posterior = diffusion.q_posterior(x0, x_t, t)
    beta = torch.from_numpy(diffusion.betas)[1:, None]
    before = torch.from_numpy(diffusion.alphas_cumprod)[:-1, None]
    # Prior N(sqrt(before) x0, 1 - before), likelihood of x_t = sqrt(1 - beta) x_{t-1} + noise of variance beta.
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x0[1:] / (1 - before) + (1 - beta).sqrt() * x_t[1:] / beta) / precision
    torch.testing.assert_close(posterior.mean[1:], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(posterior.variance[1:], 1 / precision, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(posterior.log_variance[1:], torch.log(1 / precision), rtol=1e-9, atol=1e-12)


def test_the_first_step_goes_to_the_clean_sample_with_the_second_steps_log_variance():
    diffusion = process()
    x0, x_t, t = every_step(2)
    posterior = diffusion.q_posterior(x0, x_t, t)
    torch.testing.assert_close(posterior.mean[0], x0[0])
    assert posterior.variance[0] == 0
    assert posterior.log_variance[0] == torch.log(posterior.variance[1])


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_the_true_answer_gives_the_true_posterior_and_the_clean_sample(prediction):
    diffusion = process("linear", prediction=prediction)
    x0, noise, t = every_step(3, 2, 2)
    x_t = diffusion.q_sample(x0, t, noise)
    step = diffusion.p_mean_variance(noise if prediction == "epsilon" else x0, x_t, t, clip_denoised=False)
    torch.testing.assert_close(step.x0, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(step.mean, diffusion.q_posterior(x0, x_t, t).mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(diffusion.epsilon_from_x0(x_t, t, x0), noise, rtol=1e-6, atol=1e-6)


def test_where_nothing_is_left_of_x0_the_sample_is_its_own_noise():
    diffusion = Diffusion(np.array([0.1, 0.5, 1.0]), prediction="v")
    x_t, x0 = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(diffusion.epsilon_from_x0(x_t, torch.tensor([2, 2]), x0), x_t)


def test_clipping_limits_the_predicted_sample_and_moves_the_mean_with_it():
    diffusion = process(prediction="x0")
    x0, x_t, t = every_step(2)
    step = diffusion.p_mean_variance(3 * x0, x_t, t, clip_denoised=True)
    assert step.x0.abs().max() == 1
    torch.testing.assert_close(step.mean, diffusion.q_posterior((3 * x0).clamp(-1, 1), x_t, t).mean)


def test_fixed_variances_are_the_posterior_and_beta():
    _, x_t, t = every_step(2)
    small = process(variance="fixed_small").p_mean_variance(x_t, x_t, t)
    large = process(variance="fixed_large").p_mean_variance(x_t, x_t, t)
    diffusion = process()
    np.testing.assert_allclose(small.variance.flatten(), diffusion.posterior_variance)
    np.testing.assert_allclose(large.variance.flatten()[1:], diffusion.betas[1:])
    # beta_0 would be smaller than any posterior variance: the large choice takes the second step's posterior there.
    assert large.variance.flatten()[0] == diffusion.posterior_variance[1]
    torch.testing.assert_close(large.log_variance, torch.log(large.variance))
    torch.testing.assert_close(small.log_variance[1:], torch.log(small.variance[1:]))


@pytest.mark.parametrize(("value", "table"), [(-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")])
def test_a_learned_variance_spans_posterior_to_beta_in_the_log_domain(value, table):
    diffusion = process(variance="learned_range")
    _, x_t, t = every_step(2, 3)
    ends = diffusion.p_mean_variance(torch.cat([x_t, torch.full_like(x_t, value)], 1), x_t, t)
    expected = torch.from_numpy(getattr(diffusion, table)).view(-1, 1, 1).expand_as(x_t)
    torch.testing.assert_close(ends.log_variance, expected)
    torch.testing.assert_close(ends.variance, expected.exp())
    middle = diffusion.p_mean_variance(torch.cat([x_t, torch.zeros_like(x_t)], 1), x_t, t)
    halfway = (diffusion.posterior_log_variance_clipped + diffusion.log_betas) / 2
    np.testing.assert_allclose(middle.log_variance[:, 0, 0], halfway)


@pytest.mark.parametrize("variance", VARIANCES)
def test_low_precision_outputs_are_read_in_float32(variance):
    diffusion = process(variance=variance)
    x = torch.randn(2, 1, 2, 2)
    output = torch.randn(2, 2 if variance == "learned_range" else 1, 2, 2, dtype=torch.bfloat16)
    step = diffusion.p_mean_variance(output, x, torch.tensor([3, 40]))
    again = diffusion.p_mean_variance(output.float(), x, torch.tensor([3, 40]))
    assert step.mean.dtype == step.log_variance.dtype == torch.float32
    assert torch.equal(step.mean, again.mean)
    assert torch.equal(step.log_variance, again.log_variance)


@pytest.mark.parametrize(
    ("t", "argument"),
    [([0, T], "t: "), ([-1, 0], "t: "), ([0], "t: "), ([0.0, 1.0], "t: ")],
)
def test_timesteps_out_of_range_or_of_another_batch_are_refused(t, argument):
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=argument):
        process().q_sample(x, torch.tensor(t), x)
    with pytest.raises(ValueError, match=argument):
        process().p_mean_variance(x, x, torch.tensor(t))


def test_a_denoiser_of_the_wrong_shape_is_refused_with_the_shape_it_should_have():
    x, t = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model_output.*\(2, 6, 4, 4\)"):
        process(variance="learned_range").p_mean_variance(x, x, t)
    with pytest.raises(ValueError, match="model_output"):
        process().p_mean_variance(torch.zeros(2, 6, 4, 4), x, t)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"betas": [0.0, 0.1]}, "betas"),
        ({"betas": [[0.1]]}, "betas"),
        ({"betas": []}, "betas"),
        ({"betas": [0.1], "prediction": "noise"}, "prediction"),
        ({"betas": [0.1], "variance": "learned"}, "variance"),
        ({"betas": [0.1], "loss": "l1"}, "loss"),
        ({"betas": [0.1], "timestep_map": (0, 1)}, "timestep_map"),
        ({"betas": [0.1, 0.2], "timestep_map": (1, 0)}, "timestep_map"),
        ({"betas": [0.1, 0.2], "timestep_map": (-1, 0)}, "timestep_map"),
        ({"betas": [0.1, 0.2], "timestep_map": (0, 5), "original_num_timesteps": 5}, "original_num_timesteps"),
        ({"betas": [0.1], "timestep_scale": float("nan")}, "timestep_scale"),
        ({"betas": [0.1], "timestep_scale": 0.0}, "timestep_scale"),
    ],
)
def test_what_is_no_process_is_refused_by_name(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        Diffusion(**options)


def test_a_linear_schedule_too_short_to_be_one_is_refused():
    with pytest.raises(ValueError, match="betas"):
        create_diffusion(10, noise_schedule="linear")
