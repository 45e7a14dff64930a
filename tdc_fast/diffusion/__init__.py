"""Gaussian diffusion: schedules, the process, losses, likelihood terms, respacing, samplers and timestep samplers."""

from __future__ import annotations

from tdc_fast.diffusion.create import create_diffusion
from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.distillation import distilled_losses
from tdc_fast.diffusion.guidance import GuidedDenoiser
from tdc_fast.diffusion.loss_slope import LossSlopeSampler
from tdc_fast.diffusion.samplers import Dpm2mHistory, ddim_step, ddpm_step, dpmpp_2m_step
from tdc_fast.diffusion.sampling_loop import SamplingLoop, sample
from tdc_fast.diffusion.schedules import named_betas
from tdc_fast.diffusion.timestep_samplers import (
    LossSecondMomentSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
    create_timestep_sampler,
)

__all__ = [
    "Diffusion",
    "Dpm2mHistory",
    "GuidedDenoiser",
    "LossSecondMomentSampler",
    "LossSlopeSampler",
    "SamplingLoop",
    "StratifiedSampler",
    "TimestepSampler",
    "UniformSampler",
    "create_diffusion",
    "create_timestep_sampler",
    "ddim_step",
    "ddpm_step",
    "distilled_losses",
    "dpmpp_2m_step",
    "named_betas",
    "sample",
]
