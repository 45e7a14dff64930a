"""Sources of pixels: an array, a folder of image files, or patches of photographs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tdc_fast.errors import invalid, require

OnCorrupt = Literal["error", "skip"]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif"})
PHOTO_PATCHES = 8192
DECODING_THREADS = min(8, os.cpu_count() or 1)


class ImageSource(Protocol):
    """N square images of one size.

    Attributes:
        image_size: height and width in pixels.
        channels: colour channels C.
        slow: whether fetching takes long enough to be done ahead of time.
        corrupt: positions of images found to be corrupt so far.
    """

    image_size: int
    channels: int
    slow: bool
    corrupt: set[int]

    @property
    def skipped(self) -> int:
        """Number of corrupt images left out so far."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        """Read images (B, H, W, C), uint8 or float32 in [-1, 1].

        A corrupt image is all zeros, and its position is in `corrupt` afterwards.

        Args:
            indices: (B,) int64, positions of the images.
        """
        ...

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """Block of each image (B,) int64: images of one block may share pixels, so a split keeps them together.

        Args:
            indices: (B,) int64, positions of the images.
        """
        ...


class ArraySource:
    """Images in memory or mapped from a file.

    Args:
        images: (N, H, W, C), uint8, or float in [-1, 1].
        skipped: number of corrupt images that were left out of them.
        from_zero: the values are floats in [0, 1] instead.
    """

    slow = False

    def __init__(self, images: np.ndarray, skipped: int = 0, *, from_zero: bool = False) -> None:
        self._images = images
        self._from_zero = from_zero
        self.skipped = skipped
        self.corrupt: set[int] = set()
        self.image_size, self.channels = images.shape[1], images.shape[3]

    @classmethod
    def checked(cls, images: np.ndarray, name: str, image_size: int | None) -> ArraySource:
        """A source of a user's array, checked and scaled.

        Args:
            images: (N, H, W, C) or (N, H, W), uint8, or float in [-1, 1] or [0, 1].
            name: where the array comes from, for error messages.
            image_size: size to scale uint8 images to; None takes them as they are.

        Raises:
            ValueError: another shape, dtype or range, or images that cannot be scaled.
        """
        found = f"{name}: shape {images.shape}, dtype {images.dtype}"
        if images.ndim == 3:
            images = images[..., None]  # (N, H, W) is grey
        if images.ndim != 4 or not 1 <= images.shape[-1] <= 4:
            raise invalid("images", found, "(N, H, W, C) with 1 to 4 channels last, or (N, H, W)")
        if 0 in images.shape:
            raise invalid("images", found, "at least one image with at least one pixel")
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise invalid("images", found, "uint8, or float in [-1, 1] or [0, 1]")
        from_zero = False
        if images.dtype.kind == "f":
            low, high = float(images.min()), float(images.max())
            if not (low >= -1.001 and high <= 1.001):  # also refuses NaN
                raise invalid("images", f"{name}: range {low} to {high}", "floats in [-1, 1] or [0, 1]")
            from_zero = low >= 0
        height, width = images.shape[1:3]
        if height != width or (image_size is not None and image_size != height):
            if image_size is None:
                raise invalid("images", found, "square images, or image_size to crop them to")
            if images.dtype != np.uint8:
                raise invalid("images", found, f"uint8, as floats are not resized, or {image_size} pixels square")
            images = fit_images(images, image_size, name)
        return cls(images, from_zero=from_zero)

    def __len__(self) -> int:
        return len(self._images)

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        images = self._images[indices]
        if images.dtype == np.uint8:
            return images
        images = images.astype(np.float32)
        return images * 2 - 1 if self._from_zero else images

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        return indices


class FolderSource:
    """Image files, decoded to RGB by a few threads when they are fetched.

    Args:
        files: the image files.
        image_size: size in pixels to scale and crop them to.
        on_corrupt: whether a file that cannot be decoded is an error or is left out.
    """

    slow = True
    channels = 3

    def __init__(self, files: Sequence[Path], image_size: int, on_corrupt: OnCorrupt = "error") -> None:
        self._files = files
        self._on_corrupt = on_corrupt
        self.corrupt: set[int] = set()
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self._files)

    @property
    def skipped(self) -> int:
        """Number of corrupt images left out so far."""
        return len(self.corrupt)

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        size = self.image_size
        pixels = np.zeros((len(indices), size, size, self.channels), np.uint8)
        for row, image in enumerate(self._in_threads(self._decode_or_none, indices)):
            if image is not None:
                pixels[row] = image
        return pixels

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        return indices

    def decoded(self) -> tuple[ArraySource, list[int]]:
        """Decode all images into memory; also returns the positions of those that could be decoded."""
        images = self._in_threads(self._decode_or_none, range(len(self._files)))
        kept = [position for position, image in enumerate(images) if image is not None]
        shape = (0, self.image_size, self.image_size, 3)
        stacked = np.stack([images[position] for position in kept]) if kept else np.zeros(shape, np.uint8)
        return ArraySource(stacked, skipped=len(images) - len(kept)), kept

    def _in_threads(self, decode: Callable[[int], Any], indices: Any) -> list[Any]:
        with ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode") as pool:
            return list(pool.map(decode, indices))

    def _decode_or_none(self, position: int) -> np.ndarray | None:
        from PIL import Image

        if position in self.corrupt:
            return None
        file = self._files[position]
        try:
            with Image.open(file) as image:
                image.load()
                return fit_image(_eight_bits(image), self.image_size, mode="RGB")
        # Pillow's decoders raise many kinds of error for damaged files, some of them its own, some SyntaxError.
        except Exception as error:
            if self._on_corrupt == "error":
                remedy = f"an image that can be decoded ({error}): remove it, or set on_corrupt='skip'"
                raise invalid("image", str(file), remedy) from error
            self.corrupt.add(position)
            return None


class PhotoSource:
    """Patches of scikit-learn's two sample photographs, at random positions that depend only on the size.

    Each photograph is cut into square blocks, four patches wide or as high as the photograph if that is less. A patch
    lies within one block, so holding out blocks holds out pixels. Photographs smaller than a patch are enlarged.

    Args:
        image_size: size of a patch in pixels.
        patches: number of patches.
    """

    slow = False
    channels = 3
    skipped = 0

    def __init__(self, image_size: int, patches: int = PHOTO_PATCHES) -> None:
        photos = require("sklearn.datasets", extra="demo").load_sample_images().images
        self.image_size = image_size
        self.corrupt: set[int] = set()
        self._photos = [_at_least(photo, image_size) for photo in photos]
        blocks: list[tuple[int, int, int, int]] = []  # photo, top, left, side
        for number, photo in enumerate(self._photos):
            height, width = photo.shape[:2]
            side = min(4 * image_size, height, width)
            blocks += [
                (number, top, left, side)
                for top in range(0, height - side + 1, side)
                for left in range(0, width - side + 1, side)
            ]
        rng = np.random.default_rng(image_size)
        self._block_ids = np.arange(patches) % len(blocks)
        corners = np.array(blocks)[self._block_ids]  # (N, 4)
        self.photo_ids = corners[:, 0].astype(np.int64)
        spare = corners[:, 3] - image_size + 1
        self._tops = corners[:, 1] + rng.integers(spare)
        self._lefts = corners[:, 2] + rng.integers(spare)

    def __len__(self) -> int:
        return len(self._block_ids)

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        size = self.image_size
        patches = np.empty((len(indices), size, size, 3), np.uint8)
        for row, i in enumerate(indices):
            top, left = self._tops[i], self._lefts[i]
            patches[row] = self._photos[self.photo_ids[i]][top : top + size, left : left + size]
        return patches

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        return self._block_ids[indices]


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, in depth-first order with the entries of each directory sorted by name."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += list_images(entry)
        elif entry.suffix.lower() in SUFFIXES:
            found.append(entry)
    return found


def fit_image(image: Any, size: int, mode: str | None = None) -> np.ndarray:
    """Scale and crop an image to a square, as improved-diffusion does.

    It is halved with a box filter while it is at least twice as large, scaled bicubically so that its short side fits,
    and cropped at the centre.

    Args:
        image: a PIL image.
        size: height and width of the result in pixels.
        mode: PIL mode to convert to after scaling; None keeps the image's.

    Returns:
        Pixels (size, size, C) uint8.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Resampling.BICUBIC)
    pixels = np.asarray(image if mode is None else image.convert(mode))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    pixels = pixels[top : top + size, left : left + size]
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _eight_bits(image: Any) -> Any:
    """Convert a 16-bit grey image to 8 bits: Pillow's conversion to RGB would clip its values at 255."""
    from PIL import Image

    if not image.mode.startswith("I"):  # I, or I;16 of either byte order
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def fit_images(images: np.ndarray, size: int, name: str) -> np.ndarray:
    """Apply `fit_image` to an array of images.

    Args:
        images: (N, H, W, C) uint8 with 1, 3 or 4 channels.
        size: height and width of the result in pixels.
        name: where the array comes from, for error messages.

    Raises:
        ValueError: the images have two channels.
    """
    from PIL import Image

    if images.shape[-1] == 2:
        raise invalid("images", f"{name}: 2 channels", f"{size} pixels, as two channels cannot be resized")
    planes = images[..., 0] if images.shape[-1] == 1 else images
    return np.stack([fit_image(Image.fromarray(image), size) for image in planes])


def _at_least(photo: np.ndarray, size: int) -> np.ndarray:
    """The photograph (H, W, 3), enlarged if a patch of `size` pixels does not fit."""
    height, width = photo.shape[:2]
    if min(height, width) >= size:
        return photo
    from PIL import Image

    scale = size / min(height, width)
    shape = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(shape, Image.Resampling.BICUBIC))
