"""Options of comparing two sets of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tdc_fast.diffusion.samplers import SamplerName, SpacingName
from tdc_fast.evaluation.conditions import LabelChoice
from tdc_fast.runs.denoisers import Which
from tdc_fast.runs.limits import PathText, Within
from tdc_fast.runs.precision import DtypeName


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How two sets are compared."""

    features: Literal["auto", "digits", "random-conv", "inception"] = "auto"
    """Feature space of the distances. digits: 64 features of a classifier trained on scikit-learn's digits, for 8x8
    grey images; random-conv: 64 features of a fixed random network; inception: those of --inception_weights; auto:
    inception if there are such weights, digits for 8x8 grey images, else random-conv."""
    inception_weights: PathText = ""
    """Weights of FID's Inception network: the file that torch-fidelity and pytorch-fid use, or "download" to download
    it. Results are called FID only if the file has the published checksum."""
    kept_features: Annotated[int, Within(4, 10**6)] = 10_000
    """Number of randomly chosen images of a set for kernel distance, precision and recall, which compare images in
    pairs; distances of means and covariances use all images."""
    image_size: Annotated[int, Within(0, 2**14)] = 0
    """Size in pixels to which images are scaled, except those of a run; 0 scales photos and folders to the size of a
    run or an array, and leaves other images as they are: images of a folder must then have the same shorter side."""
    num_samples: Annotated[int, Within(1, 10**7)] = 5000
    """Images drawn from a run. Distances are comparable only for the same number of images. The images take one byte
    per value in memory."""
    which: Which = "auto"
    """Which model of a run to sample: its experts, its base, or (auto) the experts if there are any."""
    vae: PathText = ""
    """For a run on latents: folder of the autoencoder with which they were encoded; it decodes the samples."""
    sampler: SamplerName = "ddim"
    """Sampler for a run."""
    steps: Annotated[int, Within(1, 10**6)] = 25
    """Sampling steps for a run."""
    spacing: SpacingName = "auto"
    """How the steps are spread over the timesteps: leading, trailing or linspace, as in diffusers; auto is the
    sampler's own."""
    guidance_scale: str = "1"
    """Scale of classifier-free guidance for a class-conditional run that was trained with --label_dropout, or a comma
    list with one scale per group, from low to high timesteps. 1 is no guidance."""
    labels: LabelChoice = "uniform"
    """Classes of the images drawn from a class-conditional run: all equally often (uniform), or as often as they occur
    in its training images (data)."""
    batch_size: Annotated[int, Within(1, 2**20)] = 500
    """Images per batch, for sampling, features and losses."""
    loss_images: Annotated[int, Within(1, 10**6)] = 512
    """Maximum number of images for a run's denoising loss."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the samples and of the noise of the loss."""
    num_threads: Annotated[int, Within(0, 2**10)] = 0
    """CPU threads; 0 keeps the default of torch."""
    device: str = "cpu"
    """Where a run is sampled, its loss is measured and features are extracted: auto, cpu, cuda or cuda:N."""
    dtype: DtypeName = "auto"
    """Precision of a run's model: float32, bfloat16 or float16 (on a GPU). auto is that of its training on a GPU, and
    float32 on the CPU. The diffusion process and the distances compute in float32 and more."""
    out: PathText = ""
    """JSON file to write the numbers to; empty takes evaluation.json in the run that is compared (the first of two), or
    in the working directory if none is."""
