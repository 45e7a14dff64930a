"""Image datasets by name or path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tdc_fast.data.fitting import fit_images
from tdc_fast.data.image_files import BACKGROUNDS, SUFFIX_WORDS, Background, list_images
from tdc_fast.data.image_sources import ArraySource, FolderSource, ImageSource, OnCorrupt, PhotoSource
from tdc_fast.data.pixels import to_unit_range
from tdc_fast.data.splitting import split_positions
from tdc_fast.errors import integer, invalid, require

DIGITS = "digits"
PHOTOS = "photos"
CACHE_BYTES = 512 * 2**20
"""A folder whose decoded images take at most this much is decoded on loading, a larger one as its images are read."""


class Dataset(Protocol):
    """What training reads its images from; `ImageDataset` is one."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""

    @property
    def channels(self) -> int:
        """Colour channels."""

    @property
    def labels(self) -> np.ndarray | None:
        """Classes, int64 (N,); None when not class conditional."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""

    @property
    def skipped(self) -> int:
        """Corrupt images left out so far."""

    @property
    def slow(self) -> bool:
        """Whether reading a batch takes long enough to be worth a thread beside a step that uses the same cores."""

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1], float32 (B, C, H, W), and the model's keyword arguments: {"y": int64 (B,)} or {}.

        It may be called in threads, ahead of the steps (`--workers`). So that a resumed run has the same batches, it
        must depend on the indices alone: what it draws, it draws from a generator seeded by them.
        """


@runtime_checkable
class DrawsAnew(Protocol):
    """A dataset whose samples are random: training draws them anew in each epoch."""

    def draw(self, indices: Any, seed: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Dataset.batch`, drawn from generators that are seeded by the seed and the indices alone.

        Args:
            indices: positions (B,) or a slice.
            seed: non-negative integers: the seed of the order, and the epoch.
        """


@dataclass(frozen=True)
class ImageDataset:
    """N square images with optional classes: a view of a source, so that splits share memory.

    Attributes:
        source: where the pixels come from.
        indices: (N,) int64, the images of the source that the dataset holds.
        labels: (N,) int64, or None if not class conditional.
        num_classes: number of classes in the whole source, also for a split; 0 without labels.
        ignored: hidden images and folders, images of formats that are not read, and the like, that were left out of a
            folder, see `load_dataset`.
    """

    source: ImageSource
    indices: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int = 0
    ignored: int = 0

    @classmethod
    def from_array(cls, images: np.ndarray, labels: np.ndarray | None = None) -> ImageDataset:
        """A dataset of arrays in memory, which may be the same as in an .npz file: see `load_dataset`.

        Args:
            images: (N, H, W, C) or (N, H, W), uint8, or float in [-1, 1] or [0, 1].
            labels: (N,) integers from 0; None for none.

        Raises:
            ValueError: another type, shape, dtype or range.
        """
        if not isinstance(images, np.ndarray):
            raise invalid("images", type(images).__name__, "a numpy array (N, H, W, C) or (N, H, W)")
        source = ArraySource.checked(images, "array", None)
        labels = _checked_labels(labels, len(source), "array")
        return cls(source, np.arange(len(source)), labels, 0 if labels is None else int(labels.max()) + 1)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.source.image_size

    @property
    def channels(self) -> int:
        """Colour channels: 3 for photographs, 1 for digits, 3 or 1 for folders, those of the array otherwise."""
        return self.source.channels

    @property
    def skipped(self) -> int:
        """Corrupt files left out so far. A folder too large to decode on loading finds them as it reads."""
        return self.source.skipped

    @property
    def slow(self) -> bool:
        """Whether images are decoded when they are read."""
        return self.source.slow

    def images(self, indices: Any = None) -> Tensor:
        """Read images.

        Args:
            indices: positions (B,) or a slice; None for all.

        Returns:
            (B, C, H, W) float32 in [-1, 1], in channels_last memory.
        """
        return self.batch(slice(None) if indices is None else indices)[0]

    def batch(self, indices: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Read images with the keyword arguments that the model gets with them.

        Args:
            indices: positions (B,) or a slice.

        Returns:
            Images as `images` returns them, and `{"y": labels (B,) int64}` if class conditional, else `{}`.
        """
        pixels, positions = self._read(np.arange(len(self))[indices].reshape(-1))
        x = torch.from_numpy(to_unit_range(pixels)).permute(0, 3, 1, 2)
        return x, {} if self.labels is None else {"y": torch.from_numpy(self.labels[positions])}

    def split(self, fraction: float, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
        """Split into a training part and a held-out part.

        Photographs are held out by region, so that no held-out patch overlaps a training patch.

        Args:
            fraction: share of the images to hold out, at least one.
            seed: seed of the choice.

        Raises:
            ValueError: a part would be empty.
        """
        kept, held = split_positions(self.source.blocks(self.indices), fraction, seed)
        return self._take(kept), self._take(held)

    def _read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (B, H, W, C) and their positions; a corrupt image is replaced by the next good one of the dataset."""
        pixels = self.source.fetch(self.indices[positions])
        for _ in range(len(self)):
            corrupt = np.isin(self.indices[positions], list(self.source.corrupt))
            if not corrupt.any():
                return pixels, positions
            positions[corrupt] = (positions[corrupt] + 1) % len(self)
            pixels[corrupt] = self.source.fetch(self.indices[positions[corrupt]])
        raise invalid("data_dir", f"{len(self)} images", "at least one that can be decoded")

    def without_corrupt(self) -> ImageDataset:
        """The dataset without the images that were found to be corrupt so far."""
        return self._take(np.flatnonzero(~np.isin(self.indices, list(self.source.corrupt))))

    def _take(self, positions: np.ndarray) -> ImageDataset:
        labels = None if self.labels is None else self.labels[positions]
        return replace(self, indices=self.indices[positions], labels=labels)


def load_dataset(
    name_or_path: str | Path,
    *,
    image_size: int | None = None,
    class_cond: bool | None = False,
    on_corrupt: OnCorrupt = "error",
    in_channels: int | None = None,
    background: Background = "white",
    cache_bytes: int = CACHE_BYTES,
) -> ImageDataset:
    """Open a dataset.

    - "digits": scikit-learn's 1797 handwritten digits, 8x8, one channel, 10 classes.
    - "photos": 8192 patches of scikit-learn's two sample photographs, `image_size` pixels (32 by default), 2 classes.
    - A folder: every jpg, jpeg, png, gif, webp, bmp, tif and tiff file below it in sorted order, as RGB, or as grey
      with `in_channels` 1. The class is the file name up to the first "_"; classes are numbered in sorted order, and
      directories do not matter. Needs `image_size`. Hidden files and folders are left out and counted, as are
      `__MACOSX`, folders that were read already (links in a circle), pipes and devices.
    - An .npz file (`arr_0` or `images`, labels in `arr_1` or `labels`) or .npy file: (N, H, W, C) or (N, H, W),
      uint8, or float in [-1, 1] or, if no value is negative, in [0, 1].

    Images of another size are halved with a box filter while at least twice as large, scaled (bicubic) so that the
    short side fits, and cropped at the centre. Before, the images of a folder are turned as their EXIF orientation
    says, converted to RGB or grey, and put on the background.

    Args:
        name_or_path: one of the above. Names take precedence over paths: write "./digits" for a folder of that name.
        image_size: height and width in pixels; None takes the images as they are.
        class_cond: load labels too; None loads them where the data has them.
        on_corrupt: "error" refuses a file that cannot be decoded by name; "skip" puts the next good image and its
            class in its place, so that all others keep theirs, and counts it.
        in_channels: colour channels that the images must have; None takes what the data has, and RGB for folders.
        background: colour behind the transparent pixels of a folder's images: "white", "grey" or "black".
        cache_bytes: a folder of at most this many decoded bytes is decoded, and so checked, at once. A larger one is
            decoded as it is read.

    Raises:
        ValueError: the data is missing, empty, corrupt or of a wrong shape.
        ImportError: "digits" and "photos" need scikit-learn; the message names the extra that installs it.
    """
    if on_corrupt not in ("error", "skip"):
        raise invalid("on_corrupt", on_corrupt, "'error' or 'skip'")
    image_size = None if image_size is None else integer("image_size", image_size)
    if background not in BACKGROUNDS:
        raise invalid("background", background, f"one of {', '.join(BACKGROUNDS)}")
    if not isinstance(name_or_path, (str, Path)):
        raise invalid("data_dir", name_or_path, "a name or a path")
    path = Path(name_or_path)
    labels: np.ndarray | None
    source: ImageSource
    ignored = 0
    if str(name_or_path) == DIGITS:
        source, labels = _load_digits(image_size)
    elif str(name_or_path) == PHOTOS:
        photos = PhotoSource(image_size or 32)
        source, labels = photos, photos.photo_ids
    elif str(name_or_path) and path.is_dir():  # Path("") would be the working directory
        files, ignored = _listed(path, image_size)
        channels = 3 if in_channels is None else in_channels
        if channels not in (1, 3):
            raise invalid("in_channels", channels, f"1 (grey) or 3 (RGB), as {path} is a folder of images")
        folder = FolderSource(files, image_size or 0, on_corrupt, channels=channels, background=background)
        source, labels = _load_folder(folder, files, cache_bytes)
    elif path.is_file() and path.suffix in (".npz", ".npy"):
        source, labels = _load_array(path, image_size, class_cond is None or class_cond)
    else:
        remedy = "'digits', 'photos', a folder of images, or an .npz or .npy file that exists"
        raise invalid("data_dir", str(name_or_path), remedy)
    if not class_cond and class_cond is not None:
        labels = None
    elif labels is None and class_cond:
        raise invalid("class_cond", class_cond, f"False, or labels as 'arr_1' or 'labels' in {path}")
    if in_channels not in (None, source.channels):
        raise invalid("in_channels", in_channels, f"{source.channels}, as the images of {name_or_path} have")
    num_classes = 0 if labels is None else int(labels.max()) + 1
    return ImageDataset(source, np.arange(len(source)), labels, num_classes, ignored)


def _load_digits(image_size: int | None) -> tuple[ImageSource, np.ndarray]:
    digits = require("sklearn.datasets", extra="demo").load_digits()
    sixteenths = digits.images[..., None].astype(np.float32)  # (1797, 8, 8, 1), 0..16
    labels = digits.target.astype(np.int64)
    if image_size in (None, 8):
        return ArraySource(sixteenths / 8 - 1), labels
    pixels = np.rint(sixteenths * (255 / 16)).astype(np.uint8)
    return ArraySource(fit_images(pixels, image_size)), labels


def _listed(folder: Path, image_size: int | None) -> tuple[list[Path], int]:
    """The image files of a folder, and how many entries were left out."""
    if image_size is None:
        raise invalid("image_size", image_size, "the size to scale a folder's images to")
    found = list_images(folder)
    if not found.files:
        raise invalid("data_dir", str(folder), f"a folder with {SUFFIX_WORDS} files in it or below")
    if found.ignored:
        first, kinds = found.ignored[0].relative_to(folder), "hidden or special entries or images of other formats"
        print(f"{folder}: left out {len(found.ignored)} {kinds}, such as {first}", flush=True)
    return found.files, len(found.ignored)


def _load_folder(folder: FolderSource, files: list[Path], cache_bytes: int) -> tuple[ImageSource, np.ndarray]:
    classes = [file.name.split("_")[0] for file in files]
    ids = {name: number for number, name in enumerate(sorted(set(classes)))}
    labels = np.array([ids[name] for name in classes], dtype=np.int64)
    if len(files) * folder.image_size**2 * folder.channels > cache_bytes:
        return folder, labels
    source = folder.decoded()
    if source.skipped == len(files):
        raise invalid("data_dir", str(files[0].parent), f"images that can be decoded; none of the {len(files)} can")
    return source, labels


def _load_array(path: Path, image_size: int | None, class_cond: bool) -> tuple[ImageSource, np.ndarray | None]:
    names = ("arr_0", "images", *(("arr_1", "labels") if class_cond else ()))
    try:
        # Memory-mapped, so that a large .npy is read as it is used; no pickles, which can run code.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                arrays = {name: loaded[name] for name in names if name in loaded.files}
            for name, value in arrays.items():
                if not isinstance(value, np.ndarray):  # bytes: a member that numpy.savez did not write
                    raise ValueError(f"{name} is not an array; numpy.savez calls its member {name}.npy")
        else:
            arrays = {"images": loaded}
    except Exception as error:
        reason = "it holds pickled objects" if "allow_pickle" in str(error) or "Python objects" in str(error) else error
        remedy = f"arrays of equal images, as numpy.savez writes them ({reason})"
        raise invalid("data_dir", str(path), remedy) from error
    images = arrays.get("arr_0", arrays.get("images"))
    if images is None:
        raise invalid("data_dir", str(path), "a file with 'arr_0' or 'images' in it")
    source = ArraySource.checked(images, str(path), image_size)
    return source, _checked_labels(arrays.get("arr_1", arrays.get("labels")), len(source), str(path))


def _checked_labels(labels: np.ndarray | None, count: int, name: str) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if (
        labels.shape != (count,)
        or labels.dtype.kind not in "iu"
        or (count and not 0 <= int(labels.min()) <= int(labels.max()) < 2**31)
    ):
        remedy = f"{count} integers from 0 up, below 2**31"
        raise invalid("labels", f"{name}: shape {labels.shape}, dtype {labels.dtype}", remedy)
    return labels.astype(np.int64)
