"""A folder of latents: index.json, and shards in safetensors' format that it lists once they are whole.

A shard holds the images `first` to `first + images - 1` of what was encoded:

    moments or samples      (images, 2C or C, H, W)    what the autoencoder said, unscaled
    flipped                 the same of the mirrored images, with --flips True
    labels                  (images,) int64            with classes
    blocks                  (images,) int64            equal where images may share pixels, as patches of one photograph
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tdc_fast.atomic import sha256_of, write_json
from tdc_fast.data.latent_space import LatentSpace
from tdc_fast.errors import brief, invalid
from tdc_fast.text_files import read_record

FORMAT = 1
INDEX = "index.json"
FLIPPED, LABELS, BLOCKS = "flipped", "labels", "blocks"
Store = Literal["moments", "samples"]
StoredDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Shard:
    """A file of latents.

    Attributes:
        file: its name.
        images: how many.
        bytes: size of the file.
        sha256: of the file.
    """

    file: str
    images: int
    bytes: int
    sha256: str

    def is_whole_in(self, folder: Path) -> bool:
        """Whether a folder has the file as it was written; reads all of it."""
        path = folder / self.file
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        with open(path, "rb") as file:
            return sha256_of(file) == self.sha256


@dataclass(frozen=True)
class LatentIndex:
    """What index.json says.

    Attributes:
        images: N, how many images there are to encode.
        store: what of each image is stored.
        flips: whether mirrored images are there too.
        dtype: of the stored values.
        seed: of samples that are drawn on encoding.
        shard_images: images in a shard, but for the last.
        num_classes: number of classes, 0 without labels.
        data: which images were encoded, in the words of the command.
        space: the latent space.
        shards: those that are whole, in order.
    """

    images: int
    store: Store
    flips: bool
    dtype: StoredDtype
    seed: int
    shard_images: int
    num_classes: int
    data: Mapping[str, Any]
    space: LatentSpace
    shards: tuple[Shard, ...] = ()

    @property
    def encoded(self) -> int:
        """Images in finished shards."""
        return sum(shard.images for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether all images are encoded."""
        return self.encoded == self.images

    @property
    def digest(self) -> str:
        """sha256 over the sums of all shards: equal where the latents are."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def shape(self, name: str, images: int) -> list[int]:
        """Shape of the tensor of that name in a shard of so many images."""
        if name in (LABELS, BLOCKS):
            return [images]
        channels = self.space.channels * (2 if self.store == "moments" else 1)
        return [images, channels, self.space.size, self.space.size]

    def names(self) -> list[str]:
        """The tensors of every shard."""
        return [self.store, *[FLIPPED] * self.flips, *[LABELS] * bool(self.num_classes), BLOCKS]

    def save(self, folder: Path) -> None:
        """Write index.json atomically."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        write_json(folder / INDEX, {"format": FORMAT, **values, "space": self.space.to_dict(), "shards": shards})

    @classmethod
    def load(cls, folder: Path, argument: str = "latents") -> LatentIndex:
        """Read index.json; the shards are not looked at.

        Args:
            folder: of the latents.
            argument: what named it, for errors.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = folder / INDEX
        if not path.is_file():
            raise invalid(argument, str(folder), f"a folder of latents, with an {INDEX}: tdc_fast.encode makes one")
        values = read_record(path)
        space = LatentSpace.from_dict(values.pop("space", None), argument, str(path))
        shards = values.pop("shards", None)
        if values.pop("format", None) != FORMAT or not _is_whole(values, shards):
            raise invalid(argument, str(path), f"the file as tdc_fast.encode wrote it; it holds {brief(values)}")
        index = cls(**values, space=space, shards=tuple(Shard(**shard) for shard in shards))
        starts = range(0, index.images, index.shard_images)[: len(index.shards)]
        if [shard.images for shard in index.shards] != [min(index.shard_images, index.images - s) for s in starts]:
            raise invalid(argument, str(path), "shards that hold its images in order; the file was changed")
        return index


def shard_file(number: int) -> str:
    """Name of a shard."""
    return f"latents-{number:05d}.safetensors"


def _is_whole(values: Mapping[str, Any], shards: Any) -> bool:
    kinds = {field.name: field.type for field in dataclasses.fields(LatentIndex)}
    if values.keys() != kinds.keys() - {"space", "shards"} or not isinstance(shards, list):
        return False
    counts = [values[name] for name in ("images", "shard_images", "num_classes", "seed")]
    return (
        all(type(value) is int for value in counts)
        and min(counts[:2]) >= 1
        and min(counts) >= 0
        and values["store"] in ("moments", "samples")
        and values["dtype"] in ("float32", "float16")
        and isinstance(values["flips"], bool)
        and isinstance(values["data"], dict)
        and all(_is_shard(shard) for shard in shards)
    )


def _is_shard(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(Shard)}:
        return False
    file = value["file"]
    return (
        all(type(value[name]) is int and value[name] > 0 for name in ("images", "bytes"))
        and all(isinstance(value[name], str) for name in ("file", "sha256"))
        and Path(file).name == file
    )
