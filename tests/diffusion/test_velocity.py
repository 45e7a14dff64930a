"""A denoiser that predicts v is one that predicts the noise, in other words: the same samples and the same bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdc_fast.diffusion import Diffusion, create_diffusion, named_betas, sample

T = 40


def processes(**options) -> tuple[Diffusion, Diffusion]:
    betas = named_betas("cosine", T)
    return Diffusion(betas, prediction="v", **options), Diffusion(betas, prediction="epsilon", **options)


def alpha_bar(diffusion: Diffusion, t: Tensor) -> Tensor:
    return torch.from_numpy(diffusion.alphas_cumprod)[t].view(-1, 1, 1, 1)


def noise_model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.5 + t.to(x).view(-1, 1, 1, 1) / 100)


def v_model(diffusion: Diffusion):
    """The same denoiser: v = (noise - sqrt(1 - alpha_bar) x_t) / sqrt(alpha_bar)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar(diffusion, t)
        return (noise_model(x.double(), t) - (1 - a).sqrt() * x) / a.sqrt()

    return model


def test_v_is_what_x0_and_noise_are_made_from_again() -> None:
    diffusion, t = processes()[0], torch.arange(T)
    x0, noise = torch.randn(2, T, 1, 2, 2, dtype=torch.float64)
    x_t, v, a = diffusion.q_sample(x0, t, noise), diffusion.velocity(x0, noise, t), alpha_bar(processes()[0], t)
    torch.testing.assert_close(v, a.sqrt() * noise - (1 - a).sqrt() * x0)
    torch.testing.assert_close(diffusion.x0_from_prediction(x_t, t, v), x0)
    perfect = diffusion.training_losses(lambda x, t: v, x0, t, noise=noise)
    assert perfect["mse"].max() < 1e-20
    wrong = diffusion.training_losses(lambda x, t: v + 1, x0, t, noise=noise)
    torch.testing.assert_close(wrong["loss"], torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_every_sampler_draws_the_same_from_it(sampler: str) -> None:
    drawn = []
    for diffusion in processes(variance="fixed_small"):
        model = v_model(diffusion) if diffusion.prediction == "v" else noise_model
        generator = torch.Generator().manual_seed(0)
        process = diffusion.with_timesteps((0, 9, 19, 29))
        drawn.append(sample(process, model, (2, 1, 4, 4), sampler=sampler, generator=generator))
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def test_the_bound_is_the_same_too() -> None:
    x0, noise, t = *torch.randn(2, T, 1, 2, 2, dtype=torch.float64), torch.arange(T)
    terms = []
    for diffusion in processes(loss="kl"):
        model = v_model(diffusion) if diffusion.prediction == "v" else noise_model
        terms.append(diffusion.training_losses(model, x0, t, noise=noise)["loss"])
    torch.testing.assert_close(*terms, rtol=1e-8, atol=1e-8)


def test_the_flag_selects_it() -> None:
    assert create_diffusion(predict_v=True).prediction == "v"
    assert create_diffusion(predict_v=True).respaced("ddim50").prediction == "v"
    with pytest.raises(ValueError, match="predict_v: got True; expected False together with predict_xstart"):
        create_diffusion(predict_v=True, predict_xstart=True)
