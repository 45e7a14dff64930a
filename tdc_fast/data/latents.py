"""Datasets of latents: what `tdc_fast.encode` wrote, drawn anew in each epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_fast.data.latent_files import BLOCKS, FLIPPED, INDEX, LABELS, LatentIndex
from tdc_fast.data.latent_space import LatentSpace, sampled
from tdc_fast.data.splitting import split_positions
from tdc_fast.errors import brief, invalid, require
from tdc_fast.progress import Progress


@dataclass(frozen=True)
class LatentDataset:
    """N latents with optional classes: a view of a folder, so that splits share it. Shards are mapped, not read whole.

    Attributes:
        shards: where the latents come from.
        indices: (N,) int64, the images of the folder that the dataset holds.
        labels: (N,) int64, or None if not class conditional.
        num_classes: number of classes in the whole folder, also for a split; 0 without labels.
    """

    shards: LatentShards
    indices: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int = 0

    slow = True
    """Drawing a batch takes about as long as decoding a small image."""
    skipped = 0
    """Corrupt images were left out on encoding."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def space(self) -> LatentSpace:
        """The latent space."""
        return self.shards.index.space

    @property
    def digest(self) -> str:
        """sha256 of the whole folder's latents."""
        return self.shards.index.digest

    @property
    def image_size(self) -> int:
        """Height and width of the latents."""
        return self.space.size

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.space.channels

    def batch(self, indices: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One draw of latents that is always the same, without mirroring, as for measuring on held-out ones.

        Args:
            indices: positions (B,) or a slice.

        Returns:
            Scaled latents, float32 (B, C, H, W), and the keyword arguments of the model as for images.
        """
        return self._read(indices, (), flips=False)

    def draw(self, indices: Any, seed: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents drawn from their moments, and one of an image and its mirror image where both are stored.

        What is drawn for an image depends on the seed and the image alone: not on the batch that it is in, and so not
        on the number of ranks.

        Args:
            indices: positions (B,) or a slice.
            seed: non-negative integers, such as the run's seed and the epoch.

        Returns:
            As `batch`.
        """
        return self._read(indices, seed, flips=self.shards.index.flips)

    def split(self, fraction: float, seed: int = 0) -> tuple[LatentDataset, LatentDataset]:
        """Split into a training part and a held-out part, as `ImageDataset.split` splits the images.

        Raises:
            ValueError: a part would be empty.
        """
        kept, held = split_positions(self.shards.read_column(BLOCKS)[self.indices], fraction, seed)
        return self._take(kept), self._take(held)

    def _take(self, positions: np.ndarray) -> LatentDataset:
        labels = None if self.labels is None else self.labels[positions]
        return replace(self, indices=self.indices[positions], labels=labels)

    def _read(self, indices: Any, seed: Sequence[int], *, flips: bool) -> tuple[Tensor, dict[str, Tensor]]:
        positions = np.arange(len(self))[indices].reshape(-1)
        index, rows = self.shards.index, self.indices[positions]
        generators = [np.random.default_rng([*seed, int(row)]) for row in rows]
        mirrored = [flips and generator.random() < 0.5 for generator in generators]
        latents = self.shards.read_rows(rows, mirrored)
        if index.store == "moments":
            latents = sampled(latents, generators)
        x = index.space.scaled(latents).contiguous(memory_format=torch.channels_last)
        return x, {} if self.labels is None else {"y": torch.from_numpy(self.labels[positions])}


@dataclass(frozen=True)
class LatentFacts:
    """What a run records of the latents that it is trained on.

    Attributes:
        space: the latent space, which decoding needs.
        digest: sha256 of the folder's latents.
    """

    space: LatentSpace
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return {"space": self.space.to_dict(), "digest": self.digest}

    @classmethod
    def from_dict(cls, values: Any, argument: str, source: str) -> LatentFacts | None:
        """What `to_dict` described; None for None.

        Args:
            values: the description.
            argument: what named the file that it is from, for errors.
            source: that file, for errors.

        Raises:
            ValueError: it is damaged; names the source.
        """
        if values is None:
            return None
        if not isinstance(values, dict) or not isinstance(values.get("digest"), str):
            raise invalid(argument, source, f"the file as it was written; latents is {brief(values)}")
        return cls(LatentSpace.from_dict(values.get("space"), argument, source), values["digest"])


def facts_of(dataset: Any) -> LatentFacts | None:
    """The facts of a dataset of latents; None for any other."""
    return LatentFacts(dataset.space, dataset.digest) if isinstance(dataset, LatentDataset) else None


class LatentShards:
    """The files of a folder of latents, opened for reading from any thread.

    Args:
        folder: where they are.

    Attributes:
        index: what index.json says.

    Raises:
        ValueError: the folder is not whole; names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        self.index = LatentIndex.load(path)
        if not self.index.complete:
            counts = f"{self.index.encoded} of {self.index.images} images are encoded"
            raise invalid("latents", str(folder), f"a whole folder; {counts}: the same tdc_fast.encode goes on")
        self._folder = path
        self._paths = [path / shard.file for shard in self.index.shards]
        self._open = require("safetensors", "diffusers").safe_open
        self._files = [self._checked(number) for number in range(len(self._paths))]

    def check_contents(self) -> None:
        """Compare the content of all files with their sha256 in the index: a second or so for each GB and core.

        Raises:
            ValueError: a file is damaged; names it.
        """
        shards = self.index.shards
        total = sum(shard.bytes for shard in shards)
        with Progress("checking latents", total, shown=total >= 2**30, unit="B") as shown:
            pool = ThreadPoolExecutor(min(len(shards), os.cpu_count() or 1))  # hashing lets go of Python's lock
            try:
                checked = pool.map(lambda shard: shard.is_whole_in(self._folder), shards)
                for path, shard, is_whole in zip(self._paths, shards, checked, strict=True):
                    if not is_whole:
                        remedy = f"the content that {INDEX} lists; it is damaged, and tdc_fast.encode makes it again"
                        raise invalid("latents", str(path), remedy)
                    shown.update(shard.bytes)
            finally:
                pool.shutdown(cancel_futures=True)

    def read_rows(self, rows: np.ndarray, mirrored: Sequence[bool]) -> Tensor:
        """What is stored of images, float32 (B, 2C or C, H, W).

        Args:
            rows: (B,) int64, the images.
            mirrored: of each, whether to take its mirror image.
        """
        index = self.index
        found = torch.empty(index.shape(index.store, len(rows)))
        for place, (row, is_mirrored) in enumerate(zip(rows.tolist(), mirrored, strict=True)):
            shard, inside = divmod(row, index.shard_images)
            name = FLIPPED if is_mirrored else index.store
            found[place] = self._files[shard].get_slice(name)[inside : inside + 1][0]
        return found

    def read_column(self, name: str) -> np.ndarray:
        """Labels or blocks of all images, int64 (N,)."""
        return np.concatenate([file.get_tensor(name).numpy() for file in self._files])

    def _checked(self, number: int) -> Any:
        """A shard, opened, after comparing its size and header with the index."""
        path, shard = self._paths[number], self.index.shards[number]
        if not path.is_file():
            raise invalid("latents", str(path), f"an existing file, which {INDEX} lists")
        size = path.stat().st_size
        if size != shard.bytes:
            raise invalid("latents", str(path), f"the file that {INDEX} lists, of {shard.bytes} bytes; it has {size}")
        wanted = {name: self.index.shape(name, shard.images) for name in self.index.names()}
        try:
            file = self._open(path, framework="pt")
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # of safetensors, which derives from Exception alone
            raise invalid("latents", str(path), f"a whole safetensors file ({error})") from error
        if shapes != wanted:
            raise invalid("latents", str(path), f"tensors of shapes {wanted}, as {INDEX} says; it has {shapes}")
        return file


def load_latents(folder: str | Path, *, class_cond: bool = False) -> LatentDataset:
    """Open a folder of latents.

    Args:
        folder: what `tdc_fast.encode` wrote.
        class_cond: load labels too.

    Raises:
        ValueError: the folder is missing, incomplete or damaged, or has no labels.
    """
    shards = LatentShards(folder)
    if not class_cond:
        return LatentDataset(shards, np.arange(shards.index.images))
    if not shards.index.num_classes:
        raise invalid("class_cond", class_cond, f"False, as the images of {folder} had no labels")
    labels = shards.read_column(LABELS)
    return LatentDataset(shards, np.arange(len(labels)), labels, shards.index.num_classes)
