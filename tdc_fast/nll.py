"""The variational bound of a model on images, in bits per dimension: `python -m tdc_fast.nll --run DIR`.

Also takes improved-diffusion's `image_nll.py` command lines, and writes its files `{vb,mse,xstart_mse}_terms.npz`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, write_json
from tdc_fast.data.dataset import load_dataset
from tdc_fast.diffusion.likelihood import bound
from tdc_fast.errors import invalid
from tdc_fast.flags import parse_flags, use_threads, value_of
from tdc_fast.runs.build import split_data
from tdc_fast.runs.denoisers import TrainedDenoiser, Which, from_checkpoint, from_run, refuse_mismatch, stored_facts
from tdc_fast.runs.directory import default_directory
from tdc_fast.runs.options import DiffusionOptions, ModelOptions


@dataclass(frozen=True, kw_only=True)
class NllOptions:
    """Which model, on which images."""

    run: str = ""
    """Run directory."""
    which: Which = "auto"
    """With --run: its experts, its base, or (auto) the experts if there are any."""
    model_path: str = ""
    """Instead of --run: one file of weights, of ours or of improved-diffusion."""
    data_dir: str = ""
    """Images: folder, .npz, .npy, digits or photos; empty takes what the run held out."""
    num_samples: int = 1000
    """At most this many images."""
    batch_size: int = 1
    """Images at once."""
    clip_denoised: bool = True
    """Clip every predicted image to [-1, 1]."""
    seed: int = 0
    """Seed of the noise."""
    num_threads: int = 0
    """CPU threads; 0 leaves the setting of the process."""
    out: str = ""
    """Folder for the files; empty takes nll/ of the run, else DIFFUSION_BLOB_LOGDIR, OPENAI_LOGDIR or a new
    temporary one."""


def bits_per_dimension(
    denoiser: TrainedDenoiser,
    x0: Tensor,
    labels: Tensor | None,
    *,
    batch_size: int,
    clip_denoised: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Means over x0 (M, C, H, W) in [-1, 1]: `total` and `prior` (), and `vb`, `mse`, `xstart_mse` (T,).

    The last three go step by step from T - 1 down to 0, as in improved-diffusion's files.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    for first in range(0, len(x0), batch_size):
        rows = slice(first, first + batch_size)
        kwargs = {} if labels is None else {"y": labels[rows]}
        terms = bound(
            denoiser.diffusion,
            denoiser.model,
            x0[rows],
            clip_denoised=clip_denoised,
            model_kwargs=kwargs,
            generator=generator,
        )
        for name in ("total", "prior", "vb", "mse", "xstart_mse"):
            sums[name] = sums.get(name, torch.zeros(())) + getattr(terms, name).double().sum(dim=0)
        done = min(first + batch_size, len(x0))
        print(f"{done} of {len(x0)} images: {float(sums['total']) / done:.4f} bits per dimension", flush=True)
    return {name: (value / len(x0)).cpu().numpy() for name, value in sums.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        directory = _run(arguments)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"tdc_fast.nll: {error}") from error
    print(f"written to {directory}")


def _run(argv: Sequence[str]) -> Path:
    run, model_path = value_of(argv, "run"), value_of(argv, "model_path")
    stored = stored_facts(run=run, model_path=model_path) if run or model_path else {}
    options = parse_flags(
        {"likelihood": NllOptions, "model": ModelOptions, "diffusion": DiffusionOptions},
        argv,
        defaults=stored,
        prog="python -m tdc_fast.nll",
        description="Measure the variational bound on the negative log likelihood, in bits per dimension.",
    )
    if bool(run) == bool(model_path):
        raise invalid("run", run, "either --run DIR or --model_path FILE")
    for name in ("num_samples", "batch_size"):
        if options[name] < 1:
            raise invalid(name, options[name], "a number above 0")
    refuse_mismatch(run or model_path, stored, options)
    use_threads(options["num_threads"])
    directory = _output_directory(options)
    denoiser = (
        from_run(run, options["which"], options["timestep_respacing"]) if run else from_checkpoint(model_path, options)
    )
    x0, labels = _images(denoiser, options)
    terms = bits_per_dimension(
        denoiser,
        x0,
        labels,
        batch_size=options["batch_size"],
        clip_denoised=options["clip_denoised"],
        seed=options["seed"],
    )
    return _write(terms, len(x0), directory)


def _images(denoiser: TrainedDenoiser, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    config = denoiser.config
    if options["data_dir"]:
        data = load_dataset(options["data_dir"], image_size=denoiser.image_size, class_cond=bool(denoiser.num_classes))
    else:
        heldout = split_data(config)[1] if config.data_dir and config.heldout else None
        if heldout is None:
            raise invalid("data_dir", "", "images to measure: the run held none out")
        data = heldout
    x0, kwargs = data.batch(np.arange(min(options["num_samples"], len(data))))
    if tuple(x0.shape[1:]) != denoiser.image_shape:
        raise invalid("data_dir", options["data_dir"], f"images of shape {denoiser.image_shape}, as the model takes")
    return x0, kwargs.get("y")


def _output_directory(options: dict[str, Any]) -> Path:
    chosen = options["out"] or (options["run"] and os.path.join(options["run"], "nll")) or default_directory()
    directory = Path(chosen or tempfile.mkdtemp(prefix="tdc-fast-nll-"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _write(terms: dict[str, np.ndarray], count: int, directory: Path) -> Path:
    for name in ("vb", "mse", "xstart_mse"):
        with atomic_file(directory / f"{name}_terms.npz") as file:
            np.savez(file, terms[name])
    numbers = {"bits_per_dimension": float(terms["total"]), "prior": float(terms["prior"]), "images": count}
    write_json(directory / "nll.json", numbers)
    print(f"{numbers['bits_per_dimension']:.4f} bits per dimension over {count} images")
    return directory


if __name__ == "__main__":
    main()
