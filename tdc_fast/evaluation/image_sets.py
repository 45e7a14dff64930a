"""Sets of images to compare: read from a dataset, or drawn from a run; brought to one size and number of channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tdc_fast.data.dataset import ImageDataset, load_dataset
from tdc_fast.data.image_files import SUFFIX_WORDS, Background, list_images
from tdc_fast.data.pixels import to_uint8
from tdc_fast.errors import invalid
from tdc_fast.evaluation.conditions import read_guidance
from tdc_fast.evaluation.options import EvaluateOptions
from tdc_fast.evaluation.samples import draw_samples, load_decoder
from tdc_fast.evaluation.statistics import SetStatistics
from tdc_fast.evaluation.statistics_files import holds_images, holds_statistics, read_reference
from tdc_fast.runs.build import named_device
from tdc_fast.runs.denoisers import TrainedDenoiser, from_run, placed
from tdc_fast.runs.limits import check_path

_READ_AT_ONCE = 64


@dataclass(frozen=True)
class ImageSet:
    """Images to compare. Those of a dataset are read as they are needed, those drawn from a run are in memory.

    Attributes:
        name: the dataset, path or run directory they come from.
        pixels: where they are: a dataset, or (M, C, H, W) uint8; None if only their statistics are known.
        denoiser: the denoiser that they were sampled from; None for a dataset.
        channels: colour channels to convert them to; None leaves them as they are.
        background: the colour that was put behind transparent pixels.
        statistics: statistics that came with them, as in the reference batches of guided-diffusion.
    """

    name: str
    pixels: ImageDataset | Tensor | None
    denoiser: TrainedDenoiser | None = None
    channels: int | None = None
    background: Background = "white"
    statistics: SetStatistics | None = None

    def __len__(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        if isinstance(self.pixels, Tensor):
            channels, height, width = self.pixels.shape[1:]
        else:
            assert self.pixels is not None
            channels, height = self.pixels.channels, self.pixels.image_size
            width = height
        return self.channels or channels, height, width

    def read(self, rows: slice) -> Tensor:
        """The images of a range, (B, C, H, W) uint8."""
        assert self.pixels is not None
        images = self.pixels[rows] if isinstance(self.pixels, Tensor) else to_uint8(self.pixels.images(rows))
        if self.channels == 1:
            images = images[:, :1]
        elif self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        return images.contiguous()

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order, (B, C, H, W) uint8."""
        for start in range(0, len(self), size):
            yield self.read(slice(start, start + size))


def load_pair(a: str, b: str, options: EvaluateOptions, *, with_statistics: bool = False) -> tuple[ImageSet, ImageSet]:
    """Load two sets of images with the same size and number of channels.

    Args:
        a: folder, array file, name of a dataset, or run directory; a run is sampled.
        b: the same.
        options: size of the images, and how runs are sampled.
        with_statistics: take the statistics of an .npz file that has them (`mu`, `sigma`); its images may be missing.

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
        if name in scaled:
            continue
        if with_statistics and holds_statistics(name):
            sets[name] = _reference(name, options.image_size or None)
        else:
            sets[name] = _run_samples(name, options) if is_run(name) else _read_images(name, options.image_size or None)
        if sets[name].pixels is not None:
            size = size or sets[name].shape[-1]
    run = next((found.denoiser for found in sets.values() if found.denoiser), None)
    size = size or _own_size([name for name in dict.fromkeys(scaled) if name != "photos"])
    for name in scaled:
        sets[name] = _read_images(name, size, run)
    first, second = sets[a], sets[b]
    for name, images in ((a, first), (b, second)):
        if images.pixels is not None and len(images) < 2:
            raise invalid(name, f"{len(images)} image", "at least 2 images")
    if first.pixels is None or second.pixels is None:
        return first, second
    first, second = _same_channels(first, second)
    if first.shape != second.shape:
        raise invalid(
            "b",
            f"{b}: images of shape {second.shape}",
            f"{first.shape}, as {a} has; --image_size scales all images but a run's",
        )
    return first, second


def is_run(name: str) -> bool:
    """Whether a name is a run directory; ValueError if it cannot be the name of anything."""
    check_path("set of images", name)
    return (Path(name) / "config.json").is_file()


def _is_folder(name: str) -> bool:
    return name not in ("digits", "photos") and Path(name).is_dir() and not is_run(name)


def _own_size(folders: Sequence[str]) -> int | None:
    """The size of the images of folders, the shorter side; None without folders.

    Raises:
        ValueError: they differ in it, or a file is no image, or there are none.
    """
    from PIL import Image

    found: dict[int, Path] = {}
    for folder in folders:
        files = list_images(Path(folder)).files
        if not files:
            raise invalid("folder", folder, f"a folder with {SUFFIX_WORDS} files, or a run directory")
        for file in files:
            try:
                with Image.open(file) as image:
                    found.setdefault(min(image.size), file)
            except Exception as error:  # Pillow raises many kinds for damaged and huge files
                raise invalid("image", str(file), f"an image that can be decoded ({error})") from error
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        remedy = f"a size to scale all images to: {first} has {one} pixels, and {second} {other}"
        raise invalid("image_size", 0, remedy)
    return next(iter(found), None)


def _read_images(name: str, size: int | None, run: TrainedDenoiser | None = None) -> ImageSet:
    """The images of a dataset; those of a folder as the run that they are compared with reads its folders."""
    if run is None or not _is_folder(name):
        return ImageSet(name, load_dataset(name, image_size=size))
    channels, background = 1 if run.image_shape[0] == 1 else 3, run.config.background
    images = load_dataset(name, image_size=size, in_channels=channels, background=background)
    return ImageSet(name, images, background=background)


def _reference(name: str, size: int | None) -> ImageSet:
    """A file of statistics, and its images if it has any."""
    statistics = read_reference(Path(name))
    has_images = holds_images(Path(name))
    return ImageSet(name, load_dataset(name, image_size=size) if has_images else None, statistics=statistics)


def _run_samples(name: str, options: EvaluateOptions) -> ImageSet:
    device = named_device(options.device)
    denoiser = from_run(name, options.which)
    decoder = load_decoder(denoiser, options.vae, device)
    denoiser = placed(denoiser, device, options.dtype)
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
        decoder=decoder,
        progress=True,
        guidance_scale=read_guidance(options.guidance_scale),
        labels=options.labels,
    )
    return ImageSet(name, images, denoiser)


def _same_channels(first: ImageSet, second: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Convert a grey and an RGB set to the same channels: grey if the RGB set has only grey images, else RGB.

    A folder is read as RGB unless it is compared with a grey run, so its images may well be grey.
    """
    channels = {first.shape[0], second.shape[0]}
    if channels != {1, 3}:
        return first, second
    rgb = first if first.shape[0] == 3 else second
    is_grey = all(bool((images == images[:, :1]).all()) for images in rgb.batches(_READ_AT_ONCE))
    return replace(first, channels=1 if is_grey else 3), replace(second, channels=1 if is_grey else 3)
