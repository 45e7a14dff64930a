"""Encoding a dataset of images into a folder of latents, shard by shard, so that it can stop anywhere and go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, sha256_of
from tdc_fast.data.autoencoder import Autoencoder
from tdc_fast.data.dataset import ImageDataset
from tdc_fast.data.latent_files import (
    BLOCKS,
    FLIPPED,
    INDEX,
    LABELS,
    LatentIndex,
    Shard,
    Store,
    StoredDtype,
    shard_file,
)
from tdc_fast.data.latent_space import sampled
from tdc_fast.errors import brief, invalid, require

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_PRINTED_IMAGES = 64


def plan_encoding(
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    *,
    store: str = "auto",
    flips: bool = False,
    dtype: StoredDtype = "float32",
    seed: int = 0,
    shard_images: int = 8192,
    scaling_factor: float = 0.0,
    data: Mapping[str, Any] | None = None,
) -> LatentIndex:
    """The index of a folder of latents before anything is encoded.

    Args:
        dataset: the images, with labels to keep them.
        autoencoder: encodes them.
        store: "moments", which training samples from anew in each epoch; "samples", one for good; "auto" for moments
            where the autoencoder has them.
        flips: store the mirror image of each image too; training takes one of both in each epoch.
        dtype: of the stored values.
        seed: of samples that are drawn now.
        shard_images: images per file.
        scaling_factor: replaces that of the autoencoder's configuration; 0 keeps it.
        data: JSON values that name the images.

    Raises:
        ValueError: the images do not fit the autoencoder, or it has no moments to store.
    """
    if store == "moments" and not autoencoder.has_moments:
        remedy = f"samples or auto: {type(autoencoder.model).__name__} encodes an image into one latent"
        raise invalid("store", store, remedy)
    kept: Store = "moments" if autoencoder.has_moments and store != "samples" else "samples"
    space = autoencoder.space(dataset.image_size, scaling_factor)
    if dataset.channels != space.image_channels:
        remedy = f"images of {space.image_channels} channels, as the autoencoder takes"
        raise invalid("data_dir", f"images of {dataset.channels} channels", remedy)
    return LatentIndex(
        images=len(dataset),
        store=kept,
        flips=flips,
        dtype=dtype,
        seed=seed,
        shard_images=shard_images,
        num_classes=dataset.num_classes if dataset.labels is not None else 0,
        data={**(data or {}), "fingerprint": _fingerprint(dataset)},
        space=space,
    )


def started(folder: Path, index: LatentIndex) -> LatentIndex:
    """The index to go on from: that of an interrupted call with the same settings, or the new one.

    It lists the shards before the first that is missing or damaged, which is named.

    Args:
        folder: of the latents; it may not exist yet.
        index: the new index.

    Raises:
        ValueError: the folder holds other latents, or something else; names the setting that differs.
    """
    if not (folder / INDEX).is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise invalid("out", str(folder), "a new or empty folder, or one of latents")
        return index
    found = LatentIndex.load(folder, "out")
    before, wanted = _settings(found), _settings(index)
    for name, value in wanted.items():
        if before.get(name) != value:
            remedy = f"{brief(before.get(name))}, with which {folder} was begun; or another --out"
            raise invalid(name, value, remedy)
    for number, shard in enumerate(found.shards):
        if not shard.is_whole_in(folder):
            print(f"{folder / shard.file} is missing or damaged: it and the files after it are made again", flush=True)
            return replace(found, shards=found.shards[:number])
    return found


def encode_rest(
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    folder: Path,
    index: LatentIndex,
    *,
    batch_size: int = 16,
    on_images: Callable[[int], None] = lambda count: None,
) -> LatentIndex:
    """Encode the images that no shard holds yet, and write their shards.

    A shard gets its name when it is whole, and is listed then: wherever this is stopped, the next call goes on with
    the first image that is not listed.

    Args:
        dataset: the images.
        autoencoder: encodes them.
        folder: of the latents; it exists.
        index: what is there already, see `started`.
        batch_size: images at once.
        on_images: called with the number of images encoded since the last call.

    Returns:
        The index of the whole folder.

    Raises:
        FloatingPointError: the autoencoder's outputs are no numbers, or too large for the stored dtype.
        OSError: a file cannot be written.
    """
    save = require("safetensors.torch", "diffusers").save
    for first in range(index.encoded, index.images, index.shard_images):
        rows = range(first, min(first + index.shard_images, index.images))
        tensors = _encoded(dataset, autoencoder, index, rows, batch_size, on_images)
        path = folder / shard_file(len(index.shards))
        with atomic_file(path) as file:
            file.write(save(tensors))
            size, checksum = file.tell(), sha256_of(file)
        index = replace(index, shards=(*index.shards, Shard(path.name, len(rows), size, checksum)))
        index.save(folder)
    return index


def _encoded(
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    index: LatentIndex,
    rows: range,
    batch_size: int,
    on_images: Callable[[int], None],
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    device = next(autoencoder.model.parameters()).device
    parts: dict[str, list[Tensor]] = {name: [] for name in index.names()}
    for batch, images, labels in _batches(dataset, rows, batch_size):
        for name, pixels in ((index.store, images), (FLIPPED, images.flip(-1))):
            if name in parts:
                encoded = autoencoder.encode(pixels.to(device)).cpu()
                if autoencoder.has_moments and index.store == "samples":
                    seeds = [(index.seed, row, int(name == FLIPPED)) for row in batch]
                    encoded = sampled(encoded, [np.random.default_rng(seed) for seed in seeds])
                parts[name].append(_stored(encoded, index, batch[0]))
        if LABELS in parts:
            parts[LABELS].append(labels)
        positions = np.arange(batch.start, batch.stop)
        parts[BLOCKS].append(torch.from_numpy(dataset.source.blocks(dataset.indices[positions])))
        on_images(len(batch))
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def _batches(dataset: ImageDataset, rows: range, batch_size: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Positions, images and labels; the next batch is read while the caller works on one."""

    def read(batch: range) -> tuple[range, Tensor, Tensor]:
        images, kwargs = dataset.batch(np.arange(batch.start, batch.stop))
        return batch, images.contiguous(), kwargs.get("y", torch.empty(0, dtype=torch.int64))

    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(1, thread_name_prefix="load-ahead") as thread:
        ahead = thread.submit(read, batches[0])
        for following in [*batches[1:], None]:
            ready = ahead.result()
            if following is not None:
                ahead = thread.submit(read, following)
            yield ready


def _stored(encoded: Tensor, index: LatentIndex, first: int) -> Tensor:
    stored = encoded.to(_DTYPES[index.dtype])
    if not bool(stored.isfinite().all()):
        what = "the autoencoder's output" if not bool(encoded.isfinite().all()) else f"the output in {index.dtype}"
        raise FloatingPointError(f"{what} holds infinities or NaN for an image from number {first} on")
    return stored


def _settings(index: LatentIndex) -> dict[str, Any]:
    """What decides the latents, by the names of the command's flags where they have one."""
    space = index.space.to_dict()
    named = {"vae": space.pop("autoencoder_hash"), "scaling_factor": space.pop("scale"), "stored_dtype": index.dtype}
    own = {name: getattr(index, name) for name in ("store", "flips", "seed", "shard_images", "images", "num_classes")}
    return {**named, **own, **space, **index.data}


def _fingerprint(dataset: ImageDataset) -> str:
    """sha256 of a few images spread over a dataset, and of all labels: whether these are the same images."""
    spread = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _PRINTED_IMAGES)).astype(np.int64))
    digest = hashlib.sha256(dataset.images(spread).contiguous().numpy().tobytes())
    if dataset.labels is not None:
        digest.update(dataset.labels.tobytes())
    return digest.hexdigest()
