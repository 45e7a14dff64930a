"""A sampler from noise to image: the timestep and the weights of every step, known before the first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.samplers import FINISHED, SamplerName, SpacingName, check_eta, sampling_steps
from tdc_fast.diffusion.updates import ddim_weights, ddpm_weights, dpmpp_2m_weights
from tdc_fast.errors import invalid


@dataclass(frozen=True)
class Trajectory:
    """The S steps of a sampler, in the order in which they are taken.

    Attributes:
        timesteps: the original timesteps that the denoiser gets, int64 (S,) on the CPU, falling.
        weights: the eight rows of `StepWeights` for every step, float64 (8, S) on the CPU.
        draws_noise: every step draws noise.
        remembers: a step reads the x0 of the step before.
    """

    timesteps: Tensor
    weights: Tensor
    draws_noise: bool
    remembers: bool

    @classmethod
    def plan(
        cls,
        diffusion: Diffusion,
        sampler: SamplerName = "ddim",
        steps: int | None = None,
        spacing: SpacingName = "auto",
        eta: float = 0.0,
    ) -> Trajectory:
        """The trajectory of a sampler.

        Args:
            diffusion: the process.
            sampler: "ddpm", "ddim" or "dpm++2m".
            steps: how many steps to visit; None visits those of `diffusion` (see `sampling_steps`).
            spacing: how the steps are spread over the timesteps.
            eta: noise of DDIM, 0 for none; the other samplers take only 0.

        Raises:
            ValueError: for an unknown sampler or spacing, steps that the process does not have, an eta that is negative
                or not of DDIM, or a step at which nothing of x0 is left where the denoiser predicts the noise.
        """
        check_eta(eta)
        visited = sampling_steps(diffusion, sampler, steps, spacing)
        if eta and sampler != "ddim":
            raise invalid("eta", eta, f"0 with the sampler {sampler}: only ddim has this setting")
        process = diffusion if len(visited) == diffusion.num_timesteps else diffusion.with_timesteps(visited)
        process.check_x0_is_defined("steps")
        t = torch.arange(process.num_timesteps - 1, -1, -1, device="cpu")
        if sampler == "ddpm":
            weights = ddpm_weights(process, t)
        elif sampler == "ddim":
            weights = ddim_weights(process, t, t - 1, eta)
        else:
            t_last = torch.cat([t.new_tensor([FINISHED]), t[:-1]])
            weights = dpmpp_2m_weights(process, t, t - 1, t_last)
        return cls(
            timesteps=process.original_timesteps(t),
            weights=torch.stack(weights),
            draws_noise=sampler == "ddpm" or (sampler == "ddim" and eta > 0),
            remembers=sampler == "dpm++2m",
        )

    def __len__(self) -> int:
        return len(self.timesteps)
