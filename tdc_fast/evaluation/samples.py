"""Images drawn from a trained denoiser, and the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, remove_leftovers
from tdc_fast.data.pixels import grid_image, to_uint8
from tdc_fast.diffusion.guidance import GuidedDenoiser
from tdc_fast.diffusion.samplers import SamplerName, SpacingName, sampling_steps
from tdc_fast.diffusion.sampling_loop import SamplingLoop
from tdc_fast.errors import invalid
from tdc_fast.progress import Progress
from tdc_fast.runs.denoisers import TrainedDenoiser
from tdc_fast.runs.processes import one_process

GRID_IMAGES = 100
MOST_GUIDANCE = 1000


@one_process
def draw_samples(
    denoiser: TrainedDenoiser,
    num_samples: int,
    *,
    sampler: SamplerName = "ddim",
    steps: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
    clip_denoised: bool = True,
    classes: Sequence[int] = (),
    device: str = "cpu",
    progress: bool = False,
    spacing: SpacingName = "auto",
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    null_class: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sample images from a denoiser.

    The same seed and batch size give every model the same starting noise.

    Args:
        denoiser: the model and its diffusion process.
        num_samples: M, how many images.
        sampler: which sampler.
        steps: sampling steps; None takes all timesteps.
        batch_size: images at once.
        seed: seed of noise and classes.
        clip_denoised: clip every predicted image to [-1, 1].
        classes: classes that a class-conditional model draws from; empty for all that it was trained on.
        device: where the model is.
        progress: show a bar on a terminal, else print lines with the time left.
        spacing: how the steps are spread over the timesteps, as in `tdc_fast.diffusion.samplers.sampling_steps`.
        eta: noise of DDIM, 0 for none.
        guidance_scale: of classifier-free guidance; 1 is none.
        null_class: the label that the model was trained with where it got no class; guidance needs it.

    Returns:
        Images (M, C, H, W) uint8 on the CPU, and their classes (M,) int64, None for an unconditional model.

    Raises:
        ValueError: the model was not trained on one of the classes, or has no such null class.
        FloatingPointError: the model's outputs are no numbers, as after a divergence.
    """
    for value in classes:
        check_class("classes", value, denoiser.classes)
    check_guidance(guidance_scale, null_class, denoiser.num_classes)
    model = denoiser.model
    if guidance_scale != 1:
        assert null_class is not None
        model = GuidedDenoiser(model, guidance_scale, null_class)
    generator = torch.Generator().manual_seed(seed)
    images, labels = [], []
    batches = range(0, num_samples, batch_size)
    loop = SamplingLoop(
        denoiser.diffusion,
        model,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=eta,
        clip_denoised=clip_denoised,
    )
    total = len(batches) * len(sampling_steps(denoiser.diffusion, sampler, steps, spacing))
    with Progress(f"drawing {num_samples} images", total, shown=progress) as shown:
        for first in batches:
            count = min(batch_size, num_samples - first)
            kwargs = {}
            if denoiser.num_classes:
                labels.append(draw_labels(classes or denoiser.classes, count, generator))
                kwargs["y"] = labels[-1].to(device)
            drawn = loop.draw(
                (count, *denoiser.image_shape),
                generator=generator,
                model_kwargs=kwargs,
                device=device,
                on_step=shown.update,
            )
            if not drawn.isfinite().all():
                raise FloatingPointError(
                    "the samples hold infinities or NaN, so nothing is written: the weights have diverged; "
                    "sample an earlier checkpoint"
                )
            images.append(to_uint8(drawn).cpu())
    return torch.cat(images), torch.cat(labels) if labels else None


def draw_labels(classes: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Labels int64 (count,) on the CPU, each class as likely as the others."""
    return torch.tensor(classes, dtype=torch.int64)[torch.randint(len(classes), (count,), generator=generator)]


def check_class(argument: str, value: int, classes: Sequence[int]) -> None:
    """Refuse a class that a model was not trained on.

    Args:
        argument: its name, for errors.
        value: the class.
        classes: the model's; empty for a model without classes.

    Raises:
        ValueError: naming the classes that there are.
    """
    if value not in classes:
        raise invalid(argument, value, f"classes that the model was trained on: {_ranges(classes)}")


def check_guidance(scale: float, null_class: int | None, num_classes: int) -> None:
    """Refuse guidance that a model cannot give.

    Args:
        scale: the guidance scale; 1 asks for none.
        null_class: the label that stands for no class, or None.
        num_classes: rows of the model's label embedding; 0 for a model without classes.

    Raises:
        ValueError: naming what is missing.
    """
    if not 0 <= scale <= MOST_GUIDANCE:
        raise invalid("guidance_scale", scale, f"a number from 0 to {MOST_GUIDANCE}; 1 is no guidance")
    if null_class is not None and not 0 <= null_class < num_classes:
        rows = (
            f"a label of the model from 0 to {num_classes - 1}" if num_classes else "none, as the model has no classes"
        )
        raise invalid("null_class", null_class, rows)
    if scale != 1 and null_class is None:
        remedy = "1, or --null_class as well: the label that the model was trained with where it got no class"
        raise invalid("guidance_scale", scale, remedy if num_classes else "1, as the model has no classes")


def write_samples(directory: Path, images: Tensor, labels: Tensor | None) -> tuple[Path, Path]:
    """Write images as an archive, `samples_{M}x{H}x{W}x{C}.npz`, and the first 100 of them as a picture.

    Also cleans up after earlier calls that were killed (`complete_samples`).

    Args:
        directory: where to write; created if it does not exist.
        images: (M, C, H, W) uint8.
        labels: (M,) int64 or None.

    Returns:
        The paths of the archive (`arr_0` the images (M, H, W, C), `arr_1` the labels) and of the .png.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    name = "samples_" + "x".join(str(size) for size in pixels.shape)
    arrays = [pixels] if labels is None else [pixels, labels.numpy()]
    archive, picture = directory / f"{name}.npz", directory / f"{name}.png"
    picture.unlink(missing_ok=True)  # of other images: an archive without a picture is completed, a wrong one is not
    with atomic_file(archive) as file:
        np.savez(file, *arrays)
    _write_picture(picture, pixels)
    complete_samples(directory)
    return archive, picture


def complete_samples(directory: Path) -> None:
    """Delete what a killed `write_samples` left half written in a directory, and draw the pictures that are missing."""
    remove_leftovers(directory, "samples_*", of_dead_processes_only=True)
    for archive in sorted(directory.glob("samples_*.npz")):
        picture = archive.with_suffix(".png")
        if not picture.exists():
            with suppress(ValueError, KeyError, OSError, BadZipFile):  # not an archive
                pixels = np.load(archive)["arr_0"]
                if pixels.dtype == np.uint8 and pixels.ndim == 4:
                    _write_picture(picture, pixels)


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    images = torch.from_numpy(pixels[:GRID_IMAGES]).permute(0, 3, 1, 2)
    with atomic_file(path) as file:
        grid_image(images, columns=10, scale=max(1, 64 // images.shape[2])).save(file, format="PNG")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as "0 to 9, 12"; "none" if there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"
