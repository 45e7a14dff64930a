"""Measure the variational bound of a model on images, in bits per dimension: `python -m tdc_fast.nll --run DIR`.

Also takes the command lines of improved-diffusion's `image_nll.py`, and writes its files
`{vb,mse,xstart_mse}_terms.npz`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("nll"))

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tdc_fast.command_line import (
    load_denoiser,
    output_directory,
    parse_denoiser_flags,
    run_command,
    use_threads,
)
from tdc_fast.entry import STOPPED
from tdc_fast.evaluation.likelihood import bits_per_dimension, images_to_measure, write_terms
from tdc_fast.runs.build import named_device
from tdc_fast.runs.denoisers import Which, placed
from tdc_fast.runs.limits import PathText, Within
from tdc_fast.runs.precision import DtypeName

__all__ = ["NllOptions", "bits_per_dimension", "main"]


@dataclass(frozen=True, kw_only=True)
class NllOptions:
    """Which model to measure, on which images."""

    run: PathText = ""
    """Run directory."""
    which: Which = "auto"
    """Which model of --run: its experts, its base, or (auto) the experts if there are any."""
    model_path: PathText = ""
    """Instead of --run: a weight file of tdc_fast or improved-diffusion."""
    data_dir: PathText = ""
    """Images: a folder, an .npz or .npy file, digits or photos; empty takes the held-out images of the run, or
    the images that it was trained on if it held out none."""
    num_samples: Annotated[int, Within(1, 10**7)] = 1000
    """Maximum number of images."""
    batch_size: Annotated[int, Within(1, 2**20)] = 1
    """Images in one batch; every batch takes a forward per timestep. 1 is the default of improved-diffusion."""
    clip_denoised: bool = True
    """Clip every predicted image to [-1, 1]."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the noise."""
    num_threads: Annotated[int, Within(0, 2**10)] = 0
    """CPU threads; 0 keeps the default of torch."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""
    dtype: DtypeName = "auto"
    """Precision of the model: float32, bfloat16 or float16 (on a GPU). auto is the precision of training on a GPU, and
    float32 on the CPU. The diffusion process computes in float32."""
    out: PathText = ""
    """Folder for the files; empty takes nll/ of the run, or with --model_path DIFFUSION_BLOB_LOGDIR, OPENAI_LOGDIR or
    a new temporary folder."""


def _measure(arguments: list[str]) -> None:
    options = parse_denoiser_flags(
        "likelihood",
        NllOptions,
        arguments,
        prog="python -m tdc_fast.nll",
        description="Measure the variational bound on the negative log likelihood, in bits per dimension.",
    )
    use_threads(options["num_threads"])
    directory = output_directory(options, "nll")
    device = named_device(options["device"])
    denoiser = placed(load_denoiser(options), device, options["dtype"])
    x0, labels, source = images_to_measure(denoiser, options["data_dir"], options["num_samples"])
    print(f"measuring {len(x0)} images: {source}", flush=True)
    terms = bits_per_dimension(
        denoiser,
        x0,
        labels,
        batch_size=options["batch_size"],
        clip_denoised=options["clip_denoised"],
        seed=options["seed"],
    )
    write_terms(directory, terms, len(x0), denoiser.dtype)
    print(f"{float(terms['total']):.4f} bits per dimension over {len(x0)} images ({source})")
    print(f"written to {directory}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_measure, argv, stopped=STOPPED["nll"])
