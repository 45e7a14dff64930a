"""Images drawn from a trained denoiser, and the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.atomic import atomic_file, remove_leftovers
from tdc_fast.data.autoencoder import LatentDecoder
from tdc_fast.data.pixels import grid_image, to_uint8
from tdc_fast.diffusion.guidance import GuidedDenoiser, check_scales
from tdc_fast.diffusion.samplers import SamplerName, SpacingName, sampling_steps
from tdc_fast.diffusion.sampling_loop import SamplingLoop
from tdc_fast.errors import invalid
from tdc_fast.progress import Progress
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.denoisers import TrainedDenoiser
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.runs.processes import one_process

GRID_IMAGES = 100
MOST_GUIDANCE = 1000
LabelChoice = Literal["uniform", "data"]
"""How labels are drawn: each class as often as the others, or as often as the training images have it."""


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
    guidance_scale: float | Sequence[float] = 1.0,
    null_class: int | None = None,
    labels: LabelChoice = "uniform",
    decoder: LatentDecoder | None = None,
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
        clip_denoised: clip every predicted image to [-1, 1]; latents are never clipped.
        classes: classes that a class-conditional model draws from; empty for all that it was trained on.
        device: where the model is.
        progress: show a bar on a terminal, else print lines with the time left.
        spacing: how the steps are spread over the timesteps, as in `tdc_fast.diffusion.samplers.sampling_steps`.
        eta: noise of DDIM, 0 for none.
        guidance_scale: of classifier-free guidance, or one for each group of timesteps, from low to high; 1 is none.
            At steps with scale 1 the prediction for no class is not computed.
        null_class: the label to guide away from; None takes the label for no class that the model was trained with
            (--label_dropout).
        labels: draw each class as often as the others, or as often as the training images have it.
        decoder: of the images, where the denoiser draws latents.

    Returns:
        Images (M, C, H, W) uint8 on the CPU, and their classes (M,) int64, None for an unconditional model.

    Raises:
        ValueError: the model was not trained on one of the classes, has no such null class, or another number of groups
            than there are guidance scales; it is not recorded how often its classes occur; or it draws latents and
            there is no decoder, or the other way round.
        FloatingPointError: the model's outputs are no numbers, as after a divergence.
    """
    for value in classes:
        check_class("classes", value, denoiser.classes)
    weights = _class_weights(denoiser, classes or denoiser.classes, labels)
    model = _guided(denoiser, guidance_scale, null_class)
    _check_decoder(denoiser, "" if decoder is None else "a decoder")
    generator = torch.Generator().manual_seed(seed)
    images, drawn_labels = [], []
    batches = range(0, num_samples, batch_size)
    loop = SamplingLoop(
        denoiser.diffusion,
        model,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=eta,
        clip_denoised=clip_denoised and denoiser.latents is None,
    )
    total = len(batches) * len(sampling_steps(denoiser.diffusion, sampler, steps, spacing))
    with Progress(f"drawing {num_samples} images", total, shown=progress) as shown:
        for first in batches:
            count = min(batch_size, num_samples - first)
            kwargs = {}
            if denoiser.num_classes:
                drawn_labels.append(draw_labels(classes or denoiser.classes, count, generator, weights))
                kwargs["y"] = drawn_labels[-1].to(device)
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
            images.append(to_uint8(drawn if decoder is None else decoder(drawn)).cpu())
    return torch.cat(images), torch.cat(drawn_labels) if drawn_labels else None


def load_decoder(denoiser: TrainedDenoiser, vae: str, device: torch.device | str = "cpu") -> LatentDecoder | None:
    """The decoder of a denoiser of latents; None for one of images.

    Args:
        denoiser: the denoiser.
        vae: folder of the autoencoder; "" for none.
        device: where it decodes.

    Raises:
        ValueError: naming --vae, which is missing, not needed, or not the one that made the latents.
    """
    _check_decoder(denoiser, vae)
    return None if denoiser.latents is None else LatentDecoder.load(vae, denoiser.latents, device)


def _check_decoder(denoiser: TrainedDenoiser, vae: str) -> None:
    if denoiser.latents is not None and not vae:
        made = f"the folder of the {denoiser.latents.autoencoder} that made them"
        raise invalid("vae", vae, f"--vae DIR, {made}, as {denoiser.name} draws latents")
    if denoiser.latents is None and vae:
        raise invalid("vae", vae, f"none, as {denoiser.name} draws images")


def draw_labels(
    classes: Sequence[int], count: int, generator: torch.Generator, weights: Sequence[float] | None = None
) -> Tensor:
    """Labels int64 (count,) on the CPU.

    Args:
        classes: the classes.
        count: how many labels.
        generator: on the CPU.
        weights: how likely each class is, up to a factor; None for each as likely as the others.
    """
    if weights is None:
        chosen = torch.randint(len(classes), (count,), generator=generator)
    else:
        shares = torch.tensor(weights, dtype=torch.float64)
        chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    return torch.tensor(classes, dtype=torch.int64)[chosen]


def _class_weights(denoiser: TrainedDenoiser, classes: Sequence[int], labels: LabelChoice) -> list[float] | None:
    """How many training images have each class, where labels are drawn so; None for each as likely as the others."""
    if labels not in get_args(LabelChoice):
        raise invalid("labels", labels, f"one of {', '.join(get_args(LabelChoice))}")
    if labels == "uniform" or not denoiser.num_classes:
        return None
    if not denoiser.class_counts:
        remedy = f"uniform, as {denoiser.name} does not record how many images had each class"
        raise invalid("labels", labels, remedy)
    counts = dict(zip(denoiser.classes, denoiser.class_counts, strict=True))
    return [counts[value] for value in classes]


def _guided(denoiser: TrainedDenoiser, scale: float | Sequence[float], null_class: int | None) -> nn.Module:
    """The denoiser's model with guidance, or as it is where that is none."""
    no_class = denoiser.null_class if null_class is None else null_class
    scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    groups = denoiser.groups if len(scales) > 1 else None
    check_guidance(scale, no_class, denoiser.num_classes, groups)
    if all(one == 1 for one in scales):
        return denoiser.model
    assert no_class is not None
    return GuidedDenoiser(denoiser.model, scale, no_class, groups)


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


def check_guidance(
    scale: float | Sequence[float], null_class: int | None, num_classes: int, groups: TimestepGroups | None = None
) -> None:
    """Refuse guidance that a model cannot give.

    Args:
        scale: the guidance scale, or one for each group of timesteps; 1 asks for none.
        null_class: the label that stands for no class, or None.
        num_classes: rows of the model's label embedding; 0 for a model without classes.
        groups: the model's groups of timesteps; None without.

    Raises:
        ValueError: naming what is missing.
    """
    check_scales(scale, groups)
    scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    if not scales or not all(0 <= one <= MOST_GUIDANCE for one in scales):
        remedy = f"a number from 0 to {MOST_GUIDANCE}, or one for each group of timesteps; 1 is no guidance"
        raise invalid("guidance_scale", scale, remedy)
    if null_class is not None and not 0 <= null_class < num_classes:
        rows = (
            f"a label of the model from 0 to {num_classes - 1}" if num_classes else "none, as the model has no classes"
        )
        raise invalid("null_class", null_class, rows)
    if null_class is None and any(one != 1 for one in scales):
        remedy = (
            "1, or --null_class as well: the label that the model was trained with where it got no class (a run with "
            "--label_dropout knows it)"
        )
        raise invalid("guidance_scale", scale, remedy if num_classes else "1, as the model has no classes")


def read_guidance(text: str) -> float | list[float]:
    """The value of --guidance_scale: a number, or a list with one for each group.

    Raises:
        ValueError: an entry is no finite number, or there is none.
    """
    scales: list[float] = comma_numbers("guidance_scale", text, float)
    if not scales:
        raise invalid("guidance_scale", text, "a number, or a comma list of one for each group; 1 is no guidance")
    return scales if len(scales) > 1 else scales[0]


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
