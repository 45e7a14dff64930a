"""A process from the flags that improved-diffusion's command lines have."""

from __future__ import annotations

from tdc_fast.diffusion.diffusion import Diffusion, Loss, Variance
from tdc_fast.diffusion.respacing import Spacing
from tdc_fast.diffusion.schedules import named_betas


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
) -> Diffusion:
    """The `Diffusion` that improved-diffusion's flags of the same names describe.

    `use_kl` trains on the rescaled bound; otherwise the loss is mse, rescaled when `rescale_learned_sigmas`.
    `rescale_timesteps` is for the denoiser to apply: it ends up in `Diffusion.timestep_scale`. An empty
    `timestep_respacing` keeps all steps. Raises ValueError for an unknown schedule or an impossible spacing.
    """
    loss: Loss = "rescaled_kl" if use_kl else ("rescaled_mse" if rescale_learned_sigmas else "mse")
    variance: Variance = "learned_range" if learn_sigma else ("fixed_small" if sigma_small else "fixed_large")
    diffusion = Diffusion(
        named_betas(noise_schedule, diffusion_steps),
        prediction="x0" if predict_xstart else "epsilon",
        variance=variance,
        loss=loss,
        timestep_scale=1000.0 / diffusion_steps if rescale_timesteps else 1.0,
    )
    # Without respacing too: betas recomputed from their product differ in the last bits, and a drop-in has those bits.
    return diffusion.respaced(timestep_respacing or [diffusion_steps])
