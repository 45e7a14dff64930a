"""A `Diffusion` from the flags of improved-diffusion's command lines."""

from __future__ import annotations

from tdc_fast.diffusion.diffusion import Diffusion, Loss, Variance
from tdc_fast.diffusion.respacing import Spacing
from tdc_fast.diffusion.schedules import named_betas
from tdc_fast.errors import invalid


def create_diffusion(
    diffusion_steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = True,
    rescale_learned_sigmas: bool = True,
    timestep_respacing: Spacing = "",
    predict_v: bool = False,
) -> Diffusion:
    """The `Diffusion` that improved-diffusion's flags of the same names describe, and `predict_v`.

    Args:
        diffusion_steps: T.
        learn_sigma: the denoiser also predicts the variance.
        sigma_small: a fixed variance is that of the posterior, not beta.
        noise_schedule: "linear" or "cosine".
        use_kl: train on the rescaled bound; otherwise on mse.
        predict_xstart: the denoiser predicts x0, not the noise.
        rescale_timesteps: set `Diffusion.timestep_scale` to 1000 / T; the denoiser applies it.
        rescale_learned_sigmas: the loss is rescaled_mse instead of mse.
        timestep_respacing: which steps to keep (see `respacing.spaced_timesteps`); "" keeps all.
        predict_v: the denoiser predicts v (`Diffusion.velocity`), which improved-diffusion does not have.

    Raises:
        ValueError: for an unknown schedule, an impossible spacing, or two predictions.
    """
    if predict_v and predict_xstart:
        raise invalid("predict_v", True, "False together with predict_xstart: the denoiser predicts one of the two")
    loss: Loss = "rescaled_kl" if use_kl else ("rescaled_mse" if rescale_learned_sigmas else "mse")
    variance: Variance = "learned_range" if learn_sigma else ("fixed_small" if sigma_small else "fixed_large")
    diffusion = Diffusion(
        named_betas(noise_schedule, diffusion_steps),
        prediction="x0" if predict_xstart else "v" if predict_v else "epsilon",
        variance=variance,
        loss=loss,
        timestep_scale=1000.0 / diffusion_steps if rescale_timesteps else 1.0,
    )
    # Also when all steps are kept: improved-diffusion then recomputes betas, which changes their last bits.
    return diffusion.respaced(timestep_respacing or [diffusion_steps])
