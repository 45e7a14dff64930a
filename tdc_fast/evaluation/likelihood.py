"""The variational bound of a denoiser on images, in bits per dimension, and the files that hold its terms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, remove_leftovers, write_json
from tdc_fast.data.dataset import DIGITS, PHOTOS, load_dataset
from tdc_fast.diffusion.likelihood import StepTerms, bound
from tdc_fast.errors import invalid
from tdc_fast.progress import Progress
from tdc_fast.runs.build import Data
from tdc_fast.runs.denoisers import TrainedDenoiser, refuse_latents, split_of
from tdc_fast.runs.processes import one_process


@one_process
def bits_per_dimension(
    denoiser: TrainedDenoiser,
    x0: Tensor,
    labels: Tensor | None,
    *,
    batch_size: int,
    clip_denoised: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The variational bound of a denoiser and its terms, averaged over images.

    Args:
        denoiser: the model and its diffusion process.
        x0: images (M, C, H, W) in [-1, 1]; each batch is measured where the model is.
        labels: (M,) int64 for a class-conditional model, else None.
        batch_size: images at once.
        clip_denoised: clip every predicted image to [-1, 1].
        seed: seed of the noise.

    Returns:
        In bits per dimension, `total` and `prior` (scalars) and `vb` (T,); `mse` and `xstart_mse` (T,), the
        squared errors of the predicted noise and image. Those of shape (T,) run from timestep T - 1 down to 0, as in
        improved-diffusion's files.
    """
    generator, device = torch.Generator().manual_seed(seed), next(denoiser.model.parameters()).device
    of_a_step = StepTerms(denoiser.diffusion, denoiser.model, clip_denoised)
    sums: dict[str, Tensor] = {}
    with Progress("bits per dimension", len(x0), unit="image") as shown:
        for first in range(0, len(x0), batch_size):
            rows = slice(first, first + batch_size)
            kwargs = {} if labels is None else {"y": labels[rows].to(device)}
            terms = bound(of_a_step, x0[rows].to(device), model_kwargs=kwargs, generator=generator)
            for name in ("total", "prior", "vb", "mse", "xstart_mse"):
                sums[name] = sums.get(name, torch.zeros(())) + getattr(terms, name).double().sum(dim=0)
            count = len(x0[rows])
            shown.update(count, f"{float(sums['total']) / (first + count):.4f} so far")
    return {name: (value / len(x0)).cpu().numpy() for name, value in sums.items()}


def images_to_measure(denoiser: TrainedDenoiser, data_dir: str, limit: int) -> tuple[Tensor, Tensor | None, str]:
    """The first images of a dataset that fits the denoiser, and their labels where it is class conditional.

    Args:
        denoiser: what the images are for.
        data_dir: folder, array file or name of a dataset; "" takes the images that the denoiser's run held out, or
            those that it was trained on if it held out none.
        limit: the most images to take.

    Returns:
        Images (M, C, H, W) float32 in [-1, 1], labels (M,) int64 or None, and in words which images they are.

    Raises:
        ValueError: there are no such images, or they have another shape than the denoiser's.
    """
    refuse_latents(denoiser, "bits per dimension are of pixels; tdc_fast.evaluate measures its held-out loss")
    config = denoiser.config
    if data_dir:
        is_folder = data_dir not in (DIGITS, PHOTOS) and Path(data_dir).is_dir()
        data: Data = load_dataset(
            data_dir,
            image_size=denoiser.image_size,
            class_cond=bool(denoiser.num_classes),
            in_channels=denoiser.channels if is_folder else None,
            background=config.background,
        )
        if is_folder:
            _refuse_other_classes(denoiser, data_dir, data.num_classes)
        source = f"the first of {data_dir}"
    elif config.data_dir:
        trained_on, heldout = split_of(denoiser)
        data = trained_on if heldout is None else heldout
        kind = "training images, as it held out none," if heldout is None else "held-out images"
        source = f"the first of the run's {kind} of {config.data_dir}"
    else:
        raise invalid("data_dir", "", "images to measure: a file of weights does not name any")
    x0, kwargs = data.batch(np.arange(min(limit, len(data))))
    if tuple(x0.shape[1:]) != denoiser.image_shape:
        raise invalid(
            "data_dir", data_dir or config.data_dir, f"images of shape {denoiser.image_shape}, as the model takes"
        )
    return x0, kwargs.get("y"), source


def _refuse_other_classes(denoiser: TrainedDenoiser, folder: str, classes: int) -> None:
    """Refuse a folder with another number of classes than the training images had: they are numbered by its own names.

    Weights of improved-diffusion do not record how many there were.
    """
    had = len(denoiser.classes)
    if denoiser.num_classes and denoiser.class_counts and classes != had:
        remedy = (
            f"a folder with images of all {had} classes that the model was trained on, as a folder's classes are "
            f"numbered by its own file names (it has {classes}), or an .npz file with their numbers"
        )
        raise invalid("data_dir", folder, remedy)


def write_terms(directory: Path, terms: dict[str, np.ndarray], count: int, dtype: str = "float32") -> None:
    """Write improved-diffusion's `{vb,mse,xstart_mse}_terms.npz`, and `nll.json` with the total.

    Args:
        directory: a folder; made if it does not exist.
        terms: what `bits_per_dimension` returned.
        count: how many images the means are over.
        dtype: what the model computed in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("*_terms.npz.*", "nll.json.*"):
        remove_leftovers(directory, name, of_dead_processes_only=True)
    (directory / "nll.json").unlink(missing_ok=True)  # of other terms: a folder with it is complete
    for name in ("vb", "mse", "xstart_mse"):
        with atomic_file(directory / f"{name}_terms.npz") as file:
            np.savez(file, terms[name])
    numbers = {
        "bits_per_dimension": float(terms["total"]),
        "prior": float(terms["prior"]),
        "images": count,
        "dtype": dtype,
    }
    write_json(directory / "nll.json", numbers)
