"""How two sets of images are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tdc_fast.diffusion.samplers import SamplerName
from tdc_fast.runs.denoisers import Which


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How two sets are compared."""

    features: Literal["auto", "digits", "random-conv"] = "auto"
    """Feature space of the distance. digits: 64 features of a classifier trained on scikit-learn's digits, for 8x8
    grey images; random-conv: 64 of a fixed random network; auto takes digits where it fits."""
    image_size: int = 0
    """Size that all images but a run's are scaled to; 0 takes the other set's for photos and a folder, else their
    own."""
    num_samples: int = 5000
    """Images drawn from a run."""
    which: Which = "auto"
    """With a run: its experts, its base, or (auto) the experts if there are any."""
    sampler: SamplerName = "ddim"
    """Sampler for a run."""
    steps: int = 25
    """Sampling steps for a run."""
    batch_size: int = 500
    """Images per batch, for sampling, features and losses."""
    loss_images: int = 512
    """At most this many images for a run's denoising loss."""
    seed: int = 0
    """Seed of sampling and of the loss's noise."""
    num_threads: int = 0
    """CPU threads; 0 leaves the setting of the process."""
    out: str = "evaluation.json"
    """File for the numbers."""
