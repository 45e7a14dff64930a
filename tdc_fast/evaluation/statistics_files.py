"""Statistics of sets of images on disk: the reference batches of guided-diffusion, and a cache of our own."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, sha256_of
from tdc_fast.data.dataset import DIGITS, PHOTOS, ImageDataset
from tdc_fast.data.image_files import list_images
from tdc_fast.data.pixels import to_uint8
from tdc_fast.errors import invalid
from tdc_fast.evaluation.class_score import ClassScore
from tdc_fast.evaluation.moments import Moments
from tdc_fast.evaluation.statistics import SetStatistics
from tdc_fast.ops.cuda_nvrtc import cache_directory

_FORMAT = 2
_PRINTED_IMAGES = 64


def holds_statistics(name: str) -> bool:
    """Whether a name is that of an .npz file with a mean and a covariance in it (`mu`, `sigma`)."""
    return name.endswith(".npz") and Path(name).is_file() and {"mu", "sigma"} <= _members(Path(name))


def holds_images(path: Path) -> bool:
    """Whether an .npz file has images in it."""
    return bool({"arr_0", "images"} & _members(path))


def _members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()  # whoever reads it says what is wrong with it


def read_reference(path: Path) -> SetStatistics:
    """Read the statistics of a reference batch of guided-diffusion or pytorch-fid.

    Args:
        path: an .npz file with `mu` (F,) and `sigma` (F, F) of the features, and perhaps `mu_s` and `sigma_s` of the
            spatial features. How many images they are of is not in it.

    Raises:
        ValueError: the file is damaged, or an array has another shape or is no covariance; names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in _statistics(arrays.files)}
    except Exception as error:  # of zipfile, zlib and numpy, each with its own for damaged files
        raise invalid("reference", str(path), f"arrays of numbers, as numpy.savez writes them ({error})") from error
    try:
        spatial = Moments.from_covariance(found["mu_s"], found["sigma_s"]) if "mu_s" in found else None
        return SetStatistics(Moments.from_covariance(found["mu"], found["sigma"]), spatial)
    except ValueError as error:
        raise invalid("reference", str(path), f"statistics of features ({error})") from error


def _statistics(names: Iterable[str]) -> list[str]:
    pairs = [("mu", "sigma"), *([("mu_s", "sigma_s")] if {"mu_s", "sigma_s"} <= set(names) else [])]
    return [name for pair in pairs for name in pair]


def cached_statistics(key: str, compute: Callable[[], SetStatistics]) -> tuple[SetStatistics, Path, bool]:
    """Statistics from the cache, or computed and written there.

    The cache is `statistics/` in TDC_FAST_CACHE, or in ~/.cache/tdc_fast. A file that is damaged is made again.

    Args:
        key: a hash of everything that they depend on.
        compute: computes them where they are not there yet.

    Returns:
        The statistics, their file, and whether they were there.
    """
    path = cache_directory() / "statistics" / f"{key[:40]}.npz"
    with contextlib.suppress(Exception):  # of zipfile, zlib and numpy, each with its own for damaged files
        return _read(path, key), path, True
    statistics = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, key, statistics)
    except OSError as error:  # the numbers are there, so a full or protected disk costs only the next evaluation time
        print(f"statistics are not kept: {error}", flush=True)
    return statistics, path, False


def content_key(name: str, data: ImageDataset, *settings: object) -> str:
    """A hash of a set of images and of all settings that its statistics depend on, in hex.

    Args:
        name: the dataset, folder or file. Every byte of the files counts, in the order in which they are read.
        data: the set as it was read, whose size and channels count too, and the pixels of some images: files that
            changed since then have another key than the set that they hold now.
        settings: whatever else they depend on.
    """
    digest = hashlib.sha256(repr((_FORMAT, len(data), data.image_size, data.channels, settings)).encode())
    path = Path(name)
    if name in (DIGITS, PHOTOS):  # which come from a package, not from a path
        for start in range(0, len(data), 256):
            digest.update(to_uint8(data.images(slice(start, start + 256))).numpy().tobytes())
        return digest.hexdigest()
    for file in list_images(path).files if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            digest.update(f"{sha256_of(opened)}\n".encode())
    for number in np.unique(np.linspace(0, len(data) - 1, min(len(data), _PRINTED_IMAGES)).astype(np.int64)):
        digest.update(to_uint8(data.images([number])).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, key: str, statistics: SetStatistics) -> None:
    arrays: dict[str, np.ndarray] = {"key": np.array(key)}
    for prefix, moments in (("pool", statistics.moments), ("spatial", statistics.spatial)):
        if moments is not None:
            arrays[f"{prefix}_count"] = np.array(moments.count)
            arrays[f"{prefix}_mean"], arrays[f"{prefix}_root"] = moments.mean.numpy(), moments.root.numpy()
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    if statistics.score is not None:
        arrays["score"] = np.array(statistics.score.values)
    arrays["names"] = np.array(sorted(arrays))  # no checksum of the file covers the names of its arrays
    with atomic_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for its own flag


def _read(path: Path, key: str) -> SetStatistics:
    with np.load(path, allow_pickle=False) as arrays:
        if str(arrays["key"]) != key or {*arrays["names"].tolist(), "names"} != {*arrays.files}:
            raise ValueError("statistics of something else, or a damaged file")

        def moments(prefix: str) -> Moments:
            count = int(arrays[f"{prefix}_count"])
            return Moments(count, _tensor(arrays[f"{prefix}_mean"]), _tensor(arrays[f"{prefix}_root"]))

        return SetStatistics(
            moments("pool"),
            moments("spatial") if "spatial_mean" in arrays.files else None,
            _tensor(arrays["features"]) if "features" in arrays.files else None,
            ClassScore(tuple(arrays["score"].tolist())) if "score" in arrays.files else None,
        )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
