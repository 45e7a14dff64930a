"""Sets of images to compare: read from a dataset, or drawn from a run; brought to one size and number of channels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tdc_fast.data.dataset import ImageDataset, load_dataset
from tdc_fast.data.image_files import SUFFIX_WORDS, list_images
from tdc_fast.data.pixels import to_uint8
from tdc_fast.errors import invalid, require
from tdc_fast.evaluation.options import EvaluateOptions
from tdc_fast.evaluation.samples import draw_samples, read_guidance
from tdc_fast.runs.build import named_device
from tdc_fast.runs.denoisers import TrainedDenoiser, from_run, placed
from tdc_fast.runs.limits import check_path

_READ_AT_ONCE = 64


@dataclass(frozen=True)
class ImageSet:
    """Images to compare.

    Attributes:
        name: the dataset, path or run directory they come from.
        images: (M, C, H, W) uint8.
        denoiser: the denoiser that they were sampled from; None for a dataset.
    """

    name: str
    images: Tensor
    denoiser: TrainedDenoiser | None = None


def load_pair(a: str, b: str, options: EvaluateOptions) -> tuple[ImageSet, ImageSet]:
    """Load two sets of images with the same size and number of channels.

    Args:
        a: folder, array file, name of a dataset, or run directory; a run is sampled.
        b: the same.
        options: size of the images, and how runs are sampled.

    Raises:
        ValueError: a set is missing, has fewer than two images, or has another shape than the other set.
    """
    for argument, name in (("A", a), ("B", b)):
        known = is_run(name) or name in ("digits", "photos") or Path(name).is_dir()
        if not known and not (Path(name).is_file() and name.endswith((".npz", ".npy"))):
            raise invalid(argument, name, "digits, photos, or an existing folder of images, .npz or .npy file, or run")
    sets: dict[str, ImageSet] = {}
    size = options.image_size or None
    scaled = [name for name in (a, b) if name == "photos" or _is_folder(name)]
    for name in sorted(dict.fromkeys((a, b)), key=is_run):  # a set that is missing shows before a run is sampled
        if name not in scaled:
            own = options.image_size or None
            sets[name] = _run_samples(name, options) if is_run(name) else _read_images(name, own)
            size = size or sets[name].images.shape[-1]
    run = next((found.denoiser for found in sets.values() if found.denoiser), None)
    for name in scaled:
        size = size or _own_size(name)
        sets[name] = _read_images(name, size, run)
    first, second = _same_channels(sets[a], sets[b])
    if first.images.shape[1:] != second.images.shape[1:]:
        raise invalid(
            "b",
            f"{b}: images of shape {tuple(second.images.shape[1:])}",
            f"{tuple(first.images.shape[1:])}, as {a} has; --image_size scales all images but a run's",
        )
    for name, images in ((a, first.images), (b, second.images)):
        if len(images) < 2:
            raise invalid(name, f"{len(images)} image", "at least 2 images")
    return first, second


def is_run(name: str) -> bool:
    """Whether a name is a run directory; ValueError if it cannot be the name of anything."""
    check_path("set of images", name)
    return (Path(name) / "config.json").is_file()


def _is_folder(name: str) -> bool:
    return name not in ("digits", "photos") and Path(name).is_dir() and not is_run(name)


def _own_size(folder: str) -> int | None:
    if folder == "photos":
        return None
    files = list_images(Path(folder)).files
    if not files:
        raise invalid("folder", folder, f"a folder with {SUFFIX_WORDS} files, or a run directory")
    with require("PIL.Image", "demo").open(files[0]) as image:
        return min(image.size)


def _read_images(name: str, size: int | None, run: TrainedDenoiser | None = None) -> ImageSet:
    """The images of a dataset; those of a folder as the run that they are compared with reads its folders."""
    if run is None or not _is_folder(name):
        return ImageSet(name, _pixels(load_dataset(name, image_size=size)))
    channels = 1 if run.image_shape[0] == 1 else 3
    data = load_dataset(name, image_size=size, in_channels=channels, background=run.config.background)
    return ImageSet(name, _pixels(data))


def _pixels(data: ImageDataset) -> Tensor:
    """All images as uint8, converted a few at a time, as floats take four times the memory."""
    size = data.image_size
    try:
        pixels = torch.empty((len(data), data.channels, size, size), dtype=torch.uint8)
    except RuntimeError as error:
        raise invalid("image_size", size, f"a size at which {len(data)} images fit the memory") from error
    for start in range(0, len(data), _READ_AT_ONCE):
        rows = slice(start, start + _READ_AT_ONCE)
        pixels[rows] = to_uint8(data.images(rows))
    return pixels


def _run_samples(name: str, options: EvaluateOptions) -> ImageSet:
    device = named_device(options.device)
    denoiser = placed(from_run(name, options.which), device, options.dtype)
    print(
        f"drawing {options.num_samples} images from {denoiser.name}: {options.sampler}, {options.steps} steps; "
        "--num_samples draws fewer",
        flush=True,
    )
    images, _ = draw_samples(
        denoiser,
        options.num_samples,
        sampler=options.sampler,
        steps=min(options.steps, denoiser.diffusion.num_timesteps),
        spacing=options.spacing,
        batch_size=options.batch_size,
        seed=options.seed,
        device=str(device),
        progress=True,
        guidance_scale=read_guidance(options.guidance_scale),
        labels=options.labels,
    )
    return ImageSet(name, images, denoiser)


def _same_channels(first: ImageSet, second: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Convert a grey and an RGB set to the same channels: grey if the RGB set has only grey images, else RGB.

    A folder is read as RGB unless it is compared with a grey run, so its images may well be grey.
    """
    channels = {first.images.shape[1], second.images.shape[1]}
    if channels != {1, 3}:
        return first, second
    rgb = first if first.images.shape[1] == 3 else second
    is_grey = bool((rgb.images == rgb.images[:, :1]).all())

    def fitted(group: ImageSet) -> ImageSet:
        images = group.images[:, :1] if is_grey else group.images.expand(-1, 3, -1, -1)
        return ImageSet(group.name, images.contiguous(), group.denoiser)

    return fitted(first), fitted(second)
