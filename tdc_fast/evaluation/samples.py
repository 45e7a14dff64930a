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
from tdc_fast.data.autoencoder import LatentDecoder
from tdc_fast.data.pixels import grid_image, to_uint8
from tdc_fast.diffusion.samplers import SamplerName, SpacingName, sampling_steps
from tdc_fast.diffusion.sampling_loop import SamplingLoop
from tdc_fast.errors import invalid
from tdc_fast.evaluation.conditions import LabelChoice, classes_to_draw, draw_labels, with_guidance
from tdc_fast.progress import Progress
from tdc_fast.runs.denoisers import TrainedDenoiser
from tdc_fast.runs.processes import one_process

GRID_IMAGES = 100


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
        eta: noise of DDIM, 0 for none; the other samplers take only 0.
        guidance_scale: of classifier-free guidance, or one for each group of timesteps, from low to high; 1 is none.
            At steps with scale 1 the prediction for no class is not computed.
        null_class: the label for no class, which is drawn only if `classes` has it; None takes the one that the model
            was trained with (--label_dropout).
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
    chosen, weights = classes_to_draw(denoiser, classes, labels, null_class)
    model = with_guidance(denoiser, guidance_scale, null_class)
    check_decoder(denoiser, "" if decoder is None else "a decoder")
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
                drawn_labels.append(draw_labels(chosen, count, generator, weights))
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
    check_decoder(denoiser, vae)
    return None if denoiser.latents is None else LatentDecoder.load(vae, denoiser.latents, device)


def check_decoder(denoiser: TrainedDenoiser, vae: str) -> None:
    """Refuse a denoiser of latents without an autoencoder, and one of images with it.

    Args:
        denoiser: the denoiser.
        vae: what names the autoencoder; "" for none.

    Raises:
        ValueError: naming --vae.
    """
    if denoiser.latents is not None and not vae:
        made = f"the folder of the {denoiser.latents.autoencoder} that made them"
        raise invalid("vae", vae, f"--vae DIR, {made}, as {denoiser.name} draws latents")
    if denoiser.latents is None and vae:
        raise invalid("vae", vae, f"none, as {denoiser.name} draws images")


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
