"""Our samplers beside diffusers' schedulers: the same timesteps, and the same samples where the steps are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")

from tdc_fast.diffusion import create_diffusion  # noqa: E402
from tdc_fast.diffusion.samplers import sampling_steps  # noqa: E402
from tdc_fast.diffusion.sampling_loop import sample  # noqa: E402


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1000, 100, 37])  # also where a position is a half: 47 and 48 of 1000
def test_spacings_visit_the_timesteps_of_diffusers(total: int, spacing: Any) -> None:
    process = create_diffusion(total)
    for name, sampler in (("DDIMScheduler", "ddim"), ("DDPMScheduler", "ddpm")):
        scheduler = getattr(diffusers, name)(total, timestep_spacing=spacing)
        for steps in [n for n in (1, 2, 3, 7, 10, 25, 36, 37, 47, 48, 61, 91, 93) if n <= total]:
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.tolist()[:steps]  # "trailing" may add -1
            assert list(sampling_steps(process, sampler, steps, spacing)) == theirs[::-1], (name, steps)


def denoiser(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    """A smooth function of both, in the place of a network."""
    return torch.sin(3 * x) * (0.5 + t.view(-1, 1, 1, 1) / 2000) + 0.1 * x.roll(1, dims=-1)


def drawn_by(scheduler: Any, x: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), t.repeat(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 7), ("leading", 20), ("trailing", 20)])
def test_ddim_draws_what_diffusers_draws(spacing: Any, steps: int, prediction: str) -> None:
    """Its scheduler goes from t to t - T // steps, which is the next timestep where these are that far apart."""
    kinds = {"v_prediction": {"predict_v": True}, "sample": {"predict_xstart": True}}
    process = create_diffusion(1000, **kinds.get(prediction, {}))
    scheduler = diffusers.DDIMScheduler(
        1000, timestep_spacing=spacing, clip_sample=False, prediction_type=prediction, trained_betas=process.betas
    )
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = drawn_by(scheduler, noise, steps)
    ours = sample(
        process, denoiser, noise.shape, sampler="ddim", steps=steps, spacing=spacing, clip_denoised=False,
        noise=noise.float(),
    )  # fmt: skip
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the scheduler
def test_dpm_solver_draws_what_diffusers_draws() -> None:
    process = create_diffusion(1000)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, timestep_spacing="trailing", trained_betas=process.betas, final_sigmas_type="zero"
    )
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = drawn_by(scheduler, noise, 20)
    ours = sample(
        process, denoiser, noise.shape, sampler="dpm++2m", steps=20, spacing="trailing", clip_denoised=False,
        noise=noise,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
