"""Images drawn from a trained denoiser, and the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file
from tdc_fast.data.pixels import grid_image, to_uint8
from tdc_fast.diffusion.samplers import SamplerName, SpacingName
from tdc_fast.errors import invalid
from tdc_fast.runs.denoisers import TrainedDenoiser

GRID_IMAGES = 100


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
        classes: classes that a class-conditional model draws from; empty for all.
        device: where the model is.
        progress: print a line per batch.
        spacing: how the steps are spread over the timesteps, as in `tdc_fast.diffusion.samplers.sampling_steps`.

    Returns:
        Images (M, C, H, W) uint8 on the CPU, and their classes (M,) int64, None for an unconditional model.

    Raises:
        ValueError: the model does not have one of the classes.
    """
    from tdc_fast.diffusion import sample

    for value in classes:
        if not 0 <= value < denoiser.num_classes:
            raise invalid("classes", value, f"classes of the model, which has {denoiser.num_classes}")
    allowed = torch.tensor(classes or range(denoiser.num_classes), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    images, labels = [], []
    for first in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - first)
        kwargs = {}
        if denoiser.num_classes:
            labels.append(allowed[torch.randint(len(allowed), (count,), generator=generator)])
            kwargs["y"] = labels[-1].to(device)
        drawn = sample(
            denoiser.diffusion,
            denoiser.model,
            (count, *denoiser.image_shape),
            sampler=sampler,
            steps=steps,
            generator=generator,
            clip_denoised=clip_denoised,
            model_kwargs=kwargs,
            device=device,
            spacing=spacing,
        )
        images.append(to_uint8(drawn).cpu())
        if progress:
            print(f"drew {first + count} of {num_samples} images", flush=True)
    return torch.cat(images), torch.cat(labels) if labels else None


def write_samples(directory: Path, images: Tensor, labels: Tensor | None) -> tuple[Path, Path]:
    """Write images as an archive, `samples_{M}x{H}x{W}x{C}.npz`, and the first 100 of them as a picture.

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
    with atomic_file(archive) as file:
        np.savez(file, *arrays)
    scale = max(1, 64 // images.shape[2])
    with atomic_file(picture) as file:
        grid_image(images[:GRID_IMAGES], columns=10, scale=scale).save(file, format="PNG")
    return archive, picture
