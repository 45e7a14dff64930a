"""Sources of pixels: an array, a folder of image files, or patches of photographs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tdc_fast.data.fitting import fit_images, patch_of
from tdc_fast.data.image_files import Background, read_image
from tdc_fast.errors import invalid, require

OnCorrupt = Literal["error", "skip"]
PHOTO_PATCHES = 8192
DECODING_THREADS = min(8, os.cpu_count() or 1)


class ImageSource(Protocol):
    """N square images of one size.

    Attributes:
        image_size: height and width in pixels.
        channels: colour channels C.
        slow: whether fetching takes long enough to be done in a thread of its own.
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
        from_zero: the values are floats in [0, 1] instead.
    """

    slow = False

    def __init__(self, images: np.ndarray, *, from_zero: bool = False) -> None:
        self._images = images
        self._from_zero = from_zero
        self.corrupt: set[int] = set()
        self.image_size, self.channels = images.shape[1], images.shape[3]

    @property
    def skipped(self) -> int:
        """Number of corrupt images."""
        return len(self.corrupt)

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
            images = fit_images(images, image_size)
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
    """Image files, decoded by a few threads when they are fetched.

    Args:
        files: the image files.
        image_size: size in pixels to scale and crop them to.
        on_corrupt: whether a file that cannot be decoded is an error or is left out.
        channels: 3 for RGB, 1 for grey.
        background: the colour behind transparent pixels.
    """

    slow = True

    def __init__(
        self,
        files: Sequence[Path],
        image_size: int,
        on_corrupt: OnCorrupt = "error",
        *,
        channels: int = 3,
        background: Background = "white",
    ) -> None:
        self._files = files
        self._on_corrupt = on_corrupt
        self._background = background
        self.channels = channels
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

    def decoded(self) -> ArraySource:
        """All images in memory; those that cannot be decoded are zeros and in `corrupt`, as in `fetch`."""
        images = ArraySource(self.fetch(np.arange(len(self._files))))
        images.corrupt = self.corrupt
        return images

    def _in_threads(self, decode: Callable[[int], Any], indices: Any) -> list[Any]:
        with ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode") as pool:
            return list(pool.map(decode, indices))

    def _decode_or_none(self, position: int) -> np.ndarray | None:
        if position in self.corrupt:
            return None
        file = self._files[position]
        try:
            return read_image(file, self.image_size, self.channels, self._background)
        # Pillow's decoders raise many kinds of error for damaged files, some of them its own, some SyntaxError.
        except Exception as error:
            if self._on_corrupt == "error":
                remedy = (
                    f"an image that can be decoded ({error}): restore it, or set on_corrupt='skip' (a resumed run "
                    "takes it as --override on_corrupt=skip)"
                )
                raise invalid("image", str(file), remedy) from error
            if not file.parent.is_dir():  # moved or unmounted: none of its images is corrupt
                raise invalid("data_dir", str(file.parent), "a folder that stays there while it is read") from error
            self.corrupt.add(position)
            return None


class PhotoSource:
    """Patches of scikit-learn's two sample photographs, at random positions that depend only on the size.

    Each photograph is cut into square blocks, four patches wide or as high as the photograph if that is less. A patch
    lies within one block, so holding out blocks holds out pixels. Photographs smaller than a patch are enlarged.

    Args:
        image_size: size of a patch in pixels.
    """

    slow = False
    channels = 3
    skipped = 0

    def __init__(self, image_size: int) -> None:
        photos = require("sklearn.datasets", extra="demo").load_sample_images().images
        self.image_size = image_size
        self.corrupt: set[int] = set()
        self._photos = photos
        self._scales = [max(1.0, image_size / min(photo.shape[:2])) for photo in photos]
        blocks: list[tuple[int, int, int, int]] = []  # photo, top, left, side
        for number, (photo, scale) in enumerate(zip(photos, self._scales, strict=True)):
            height, width = (round(length * scale) for length in photo.shape[:2])
            side = min(4 * image_size, height, width)
            blocks += [
                (number, top, left, side)
                for top in range(0, height - side + 1, side)
                for left in range(0, width - side + 1, side)
            ]
        rng = np.random.default_rng(image_size)
        self._block_ids = np.arange(PHOTO_PATCHES) % len(blocks)
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
            photo, scale = self._photos[self.photo_ids[i]], self._scales[self.photo_ids[i]]
            patches[row] = patch_of(photo, scale, self._tops[i], self._lefts[i], size)
        return patches

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """See `ImageSource`."""
        return self._block_ids[indices]
