from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tdc_fast.diffusion import Diffusion, named_betas
from tdc_fast.diffusion.gaussian import discretized_gaussian_log_likelihood
from tdc_fast.diffusion.likelihood import StepTerms, bound
from tdc_fast.graphs import use_capture
from tests.graphs.tape import TapeCapture

T = 40
LOG2 = torch.log(torch.tensor(2.0, dtype=torch.float64))


def make(**options) -> Diffusion:
    return Diffusion(named_betas("cosine", T), **options)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Affine(torch.nn.Module):
    """Answers scale * x and, when asked for 2C channels, a constant variance value."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.value = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64)) if learned else None

    def forward(self, x, t):
        y = self.scale * x
        return y if self.value is None else torch.cat([y, self.value.expand_as(y)], dim=1)


def losses(loss: str, variance: str = "learned_range", prediction: str = "epsilon"):
    diffusion = make(loss=loss, variance=variance, prediction=prediction)
    model = Affine(variance == "learned_range")
    x0, noise, t = 0.5 * draw(T, 2, 2, 2), draw(T, 2, 2, 2, seed=1), torch.arange(T)
    return diffusion, model, x0, noise, t, diffusion.training_losses(model, x0, t, noise)


@pytest.mark.parametrize("loss", ["mse", "rescaled_mse"])
@pytest.mark.parametrize(("prediction", "variance"), [("epsilon", "fixed_small"), ("x0", "fixed_large")])
def test_with_a_fixed_variance_mse_is_the_squared_error_alone(loss, prediction, variance):
    diffusion, model, x0, noise, t, terms = losses(loss, variance, prediction)
    error = (noise if prediction == "epsilon" else x0) - model(diffusion.q_sample(x0, t, noise), t)
    assert set(terms) == {"loss", "mse"}
    torch.testing.assert_close(terms["mse"], (error**2).flatten(1).mean(1))
    assert torch.equal(terms["loss"], terms["mse"])


@pytest.mark.parametrize(("loss", "factor"), [("mse", 1.0), ("rescaled_mse", T / 1000)])
def test_the_hybrid_loss_adds_the_bound_scaled_as_named(loss, factor):
    diffusion, model, x0, noise, t, terms = losses(loss)
    x_t = diffusion.q_sample(x0, t, noise)
    vb = diffusion.vb_terms(model(x_t, t), x0, x_t, t, clip_denoised=False)
    torch.testing.assert_close(terms["vb"], factor * vb)
    torch.testing.assert_close(terms["loss"], terms["mse"] + factor * vb)


def test_the_hybrid_losss_bound_trains_the_variance_and_never_the_mean():
    _, model, *_, terms = losses("rescaled_mse")
    terms["vb"].sum().backward(retain_graph=True)
    assert model.scale.grad is None or model.scale.grad == 0
    assert model.value.grad != 0
    terms["mse"].sum().backward()
    assert model.scale.grad != 0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_the_divergence_of_the_posteriors_in_bits(variance):
    diffusion, model, x0, noise, t, terms = losses("kl", variance)
    x_t = diffusion.q_sample(x0, t, noise)
    truth = diffusion.q_posterior(x0, x_t, t)
    step = diffusion.p_mean_variance(model(x_t, t), x_t, t, clip_denoised=False)
    expected = kl_divergence(
        Normal(truth.mean, (truth.log_variance / 2).exp()), Normal(step.mean, (step.log_variance / 2).exp())
    )
    torch.testing.assert_close(terms["loss"][1:], expected.flatten(1).mean(1)[1:] / LOG2)
    pixels = discretized_gaussian_log_likelihood(x0, step.mean, (0.5 * step.log_variance).expand_as(x0))
    torch.testing.assert_close(terms["loss"][0], -pixels[0].mean() / LOG2)
    assert set(terms) == {"loss"}


def test_the_rescaled_bound_estimates_all_steps():
    torch.testing.assert_close(losses("rescaled_kl")[-1]["loss"], T * losses("kl")[-1]["loss"])


def test_the_bound_of_the_exact_reverse_process_is_the_log_likelihood(gaussian_data):
    """Nothing is lost to the bound when mean and variance are the true ones: it is -log2 p(x0) per pixel width."""
    diffusion = Diffusion(named_betas("cosine", 60), variance="learned_range")
    spread = 0.02
    data = gaussian_data(diffusion, covariance=spread)
    before, now = diffusion.alphas_cumprod_prev, diffusion.alphas_cumprod
    variance = (before * spread + 1 - before) * diffusion.betas / (now * spread + 1 - now)
    low, high = diffusion.posterior_log_variance_clipped, diffusion.log_betas
    value = torch.from_numpy(2 * (np.log(variance) - low) / (high - low) - 1)

    def model(x, t):
        return torch.cat([data.denoiser(x, t), value[t].view(-1, 1).expand_as(x)], dim=1)

    x0 = data.mean + spread**0.5 * draw(2000, 2)
    result = bound(StepTerms(diffusion, model, clip_denoised=False), x0, generator=torch.Generator().manual_seed(1))
    log_density = Normal(data.mean, spread**0.5).log_prob(x0).mean()
    expected = -(log_density + torch.log(torch.tensor(2 / 255))) / LOG2
    assert result.total.mean().item() == pytest.approx(expected.item(), abs=0.06)
    assert result.vb.shape == result.mse.shape == result.xstart_mse.shape == (2000, 60)


def test_prior_bits_are_the_divergence_of_the_last_marginal_from_a_standard_normal():
    diffusion = Diffusion(named_betas("linear", 50)[:20])
    x0 = draw(3, 1, 2, 2)
    alpha_bar = torch.tensor(diffusion.alphas_cumprod[-1])
    expected = kl_divergence(Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt()), Normal(0.0 * x0, 1.0))
    torch.testing.assert_close(diffusion.prior_bpd(x0), expected.flatten(1).mean(1) / LOG2)
    result = bound(StepTerms(diffusion, Affine(False)), x0)
    assert result.prior.min() > 0.01
    torch.testing.assert_close(result.prior, diffusion.prior_bpd(x0))
    torch.testing.assert_close(result.total, result.vb.sum(1) + result.prior)


def test_a_bound_where_the_noise_does_not_say_what_x0_is_is_refused():
    diffusion = Diffusion(named_betas("linear", 20))  # its last beta is 1
    with pytest.raises(ValueError, match="timestep_respacing: got 'timestep 19, where alpha_bar is 0'; expected a"):
        StepTerms(diffusion, Affine(False))
    StepTerms(diffusion.respaced("ddim10"), Affine(False))  # from timestep 18 on
    diffusion = Diffusion(named_betas("linear", 20), prediction="v")
    result = bound(StepTerms(diffusion, Affine(False)), draw(2, 1, 4, 4))
    assert all(terms.isfinite().all() for terms in vars(result).values())


def test_a_bound_from_graphs_is_the_bound_without_them():
    diffusion, model, tape = make(variance="learned_range"), Affine(True), TapeCapture()
    batches = [draw(3, 1, 2, 2, seed=seed) for seed in (1, 2)]

    def bounds():
        terms, generator = StepTerms(diffusion, model), torch.Generator().manual_seed(0)
        return [bound(terms, x0, generator=generator) for x0 in batches]

    plain = bounds()
    with use_capture(tape):
        for ours, theirs in zip(bounds(), plain, strict=True):
            for name in ("total", "vb", "mse", "xstart_mse"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert [one.replays for one in tape.tapes] == [2 * T - 2]


def test_noise_is_drawn_when_none_is_given():
    diffusion, model = make(), Affine(False)
    x0, t = torch.zeros(T, 1, 4, 4), torch.arange(T)
    torch.manual_seed(0)
    first = diffusion.training_losses(model, x0, t)["loss"]
    assert first.shape == (T,) and not torch.equal(first, diffusion.training_losses(model, x0, t)["loss"])


def test_model_arguments_reach_the_model():
    def model(x, t, y):
        return x * y.view(-1, 1, 1, 1)

    x0, t = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    noise = torch.ones_like(x0)
    terms = make().training_losses(model, x0, t, noise, model_kwargs={"y": torch.tensor([0, 1])})
    assert terms["mse"][0] == 1 and terms["mse"][1] < 1
