"""Sample images from a trained model: `python -m tdc_fast.sample --run DIR`.

Also takes the command lines of improved-diffusion's `image_sample.py`: `--model_path ema_0.9999_010000.pt`, the
flags of the model, `--num_samples --batch_size --use_ddim --clip_denoised --timestep_respacing`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("sample"))

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tdc_fast.command_line import (
    load_denoiser,
    output_directory,
    parse_denoiser_flags,
    run_command,
    use_threads,
)
from tdc_fast.diffusion.samplers import SpacingName
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.evaluation.conditions import LabelChoice, read_guidance
from tdc_fast.evaluation.samples import draw_samples, load_decoder, write_samples
from tdc_fast.runs.build import named_device
from tdc_fast.runs.denoisers import Which, placed
from tdc_fast.runs.limits import PathText, Within, comma_numbers
from tdc_fast.runs.precision import DtypeName

__all__ = ["SampleOptions", "draw_samples", "main", "write_samples"]

QUICK_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How many images to sample, from which model, and how."""

    run: PathText = ""
    """Run directory to sample from."""
    which: Which = "auto"
    """Which model of --run: its experts, its base, or (auto) the experts if there are any."""
    model_path: PathText = ""
    """Instead of --run: a weight file of tdc_fast or improved-diffusion. For a file of tdc_fast the configuration
    stored beside it is used, and flags that contradict it are an error; for others, give the flags of the model."""
    vae: PathText = ""
    """For a model of latents: folder of the autoencoder of diffusers with which they were encoded; it decodes the
    samples. Another encoder is an error."""
    num_samples: Annotated[int, Within(0, 10**7)] = 0
    """Number of images; 0 takes 100 with --run, and improved-diffusion's 10000 with --model_path."""
    batch_size: Annotated[int, Within(0, 2**20)] = 0
    """Images sampled at once; 0 takes 100 with --run, and improved-diffusion's 16 with --model_path."""
    sampler: Literal["auto", "ddpm", "ddim", "dpm++2m"] = "auto"
    """auto takes ddim with --use_ddim True, else ddpm; but with --run and neither --steps nor --timestep_respacing,
    ddim in 50 steps."""
    use_ddim: bool = False
    """improved-diffusion's switch for DDIM."""
    steps: Annotated[int, Within(0, 10**6)] = 0
    """Sampling steps; 0 takes all timesteps, or those of --timestep_respacing."""
    spacing: SpacingName = "auto"
    """How --steps are spread over the timesteps: leading (multiples of T // steps from 0), trailing (T / steps counted
    down from the last timestep) or linspace (evenly, with both ends), as in diffusers. auto is multiples of T / steps
    from 0 for ddim, linspace for ddpm, and equal steps in log SNR for dpm++2m."""
    clip_denoised: bool = True
    """Clip every predicted image to [-1, 1]; latents are never clipped."""
    classes: str = ""
    """For class-conditional models: comma list of the classes to sample; empty samples all classes."""
    eta: Annotated[float, Within(0, 1000)] = 0.0
    """Noise of ddim: 0 is deterministic, 1 has the variance of ddpm with --sigma_small True. Other samplers take only
    0."""
    labels: LabelChoice = "uniform"
    """For class-conditional models: draw all classes equally often (uniform), or as often as they occur in the training
    images (data)."""
    guidance_scale: str = "1"
    """For class-conditional models: scale of classifier-free guidance from 0 to 1000, 1 for none, 0 for images of no
    class; or a comma list with one scale per group, from low to high timesteps. A step with scale 1 costs half as much
    as with another scale."""
    null_class: Annotated[int, Within(-1, 10**7)] = -1
    """With --guidance_scale: the label for no class that the model was trained with; -1 is that of a run with
    --label_dropout. It is sampled only if --classes has it."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the noise and the classes."""
    deterministic: bool = False
    """Run a single denoiser on the routed kernels too, so that on the CPU its images do not depend on the rest of the
    batch (those of experts never do). `tdc_fast.serve` does this by default."""
    num_threads: Annotated[int, Within(0, 2**10)] = 0
    """CPU threads; 0 keeps the default of torch."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    dtype: DtypeName = "auto"
    """Precision of the model: float32, bfloat16 or float16 (on a GPU). auto is the precision of training on a GPU, and
    float32 on the CPU. The diffusion process computes in float32."""
    out: PathText = ""
    """Folder for the .npz and the .png file; empty takes samples/ of the run, or with --model_path
    DIFFUSION_BLOB_LOGDIR, OPENAI_LOGDIR or a new temporary folder."""


def _parse(arguments: list[str]) -> dict[str, Any]:
    options = parse_denoiser_flags(
        "sampling",
        SampleOptions,
        arguments,
        prog="python -m tdc_fast.sample",
        description="Sample images from a run directory or from a file of weights.",
    )
    _fill_in(options)
    return options


def _fill_in(options: dict[str, Any]) -> None:
    """Choose what was left open: quick settings for a run, those of improved-diffusion for a file of weights."""
    is_run = bool(options["run"])
    options["num_samples"] = options["num_samples"] or (100 if is_run else 10000)
    options["batch_size"] = options["batch_size"] or (100 if is_run else 16)
    if options["sampler"] != "auto":
        if options["use_ddim"] and options["sampler"] != "ddim":
            raise invalid("sampler", options["sampler"], "ddim, or no --use_ddim True, which asks for it")
        return
    all_steps = not options["steps"] and not options["timestep_respacing"]
    options["sampler"] = "ddim" if options["use_ddim"] or (is_run and all_steps) else "ddpm"
    if is_run and all_steps:
        options["steps"] = min(QUICK_STEPS, options["diffusion_steps"])


def _sample(arguments: list[str]) -> None:
    options = _parse(arguments)
    denoiser = load_denoiser(options)
    if options["deterministic"]:
        denoiser = denoiser.batch_invariant()
    use_threads(options["num_threads"])
    directory = output_directory(options, "samples")  # before hours of sampling, as it may fail
    device = named_device(options["device"])
    decoder = load_decoder(denoiser, options["vae"], device)
    denoiser = placed(denoiser, device, options["dtype"])
    images, labels = draw_samples(
        denoiser,
        options["num_samples"],
        sampler=options["sampler"],
        steps=options["steps"] or None,
        spacing=options["spacing"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        clip_denoised=options["clip_denoised"],
        classes=comma_numbers("classes", options["classes"], int),
        device=str(device),
        eta=options["eta"],
        guidance_scale=read_guidance(options["guidance_scale"]),
        null_class=None if options["null_class"] < 0 else options["null_class"],
        labels=options["labels"],
        decoder=decoder,
        progress=True,
    )
    archive, picture = write_samples(directory, images, labels)
    print(f"samples: {archive}\ngrid:    {picture}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, sample, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_sample, argv, stopped=STOPPED["sample"])
