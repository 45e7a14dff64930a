"""Encode images into latents for `tdc_fast.train --latents`: `python -m tdc_fast.encode --vae DIR --data_dir DIR`."""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("encode"))

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tdc_fast.atomic import remove_leftovers
from tdc_fast.command_line import check_writable, parse_flags, run_command, use_threads
from tdc_fast.data.autoencoder import Autoencoder
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.encoding import encode_rest, plan_encoding, started
from tdc_fast.data.latent_files import LatentIndex, StoredDtype
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.progress import Progress
from tdc_fast.runs.build import named_device
from tdc_fast.runs.limits import PathText, Within
from tdc_fast.runs.lock import sole_writer

__all__ = ["EncodeOptions", "encode", "main"]


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Which images to encode, with which autoencoder, and what to keep."""

    vae: PathText = ""
    """Folder of an AutoencoderKL or VQModel of diffusers: config.json and the weights. It computes in float32."""
    data_dir: PathText = ""
    """Images: a folder, an .npz or .npy file, digits or photos, as for training. Labels are kept if there are any."""
    out: PathText = ""
    """Folder for the latents. If some of them are already there, the rest is encoded."""
    image_size: Annotated[int, Within(0, 2**14)] = 0
    """Height and width of the images in pixels, required for folders; 0 takes other images as they are."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What to do with an unreadable image: stop and name it, or leave it out."""
    background: Literal["white", "grey", "black"] = "white"
    """Colour behind the transparent pixels of a folder's images."""
    store: Literal["auto", "moments", "samples"] = "auto"
    """What to store for an image: moments, from which training draws a new latent in each epoch; or samples, one fixed
    latent. auto stores moments if the autoencoder has them."""
    flips: bool = False
    """Also encode the mirror image of each image; training takes one of the two in each epoch."""
    scaling_factor: Annotated[float, Within(0, 10**6)] = 0.0
    """Factor by which latents are multiplied for the denoiser; 0 takes that of the autoencoder's config.json."""
    stored_dtype: StoredDtype = "float32"
    """Precision of the files; float16 takes half the space."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the latents of --store samples."""
    batch_size: Annotated[int, Within(1, 2**16)] = 16
    """Images in one batch."""
    shard_images: Annotated[int, Within(1, 10**7)] = 8192
    """Images per file; an interrupted command continues with the first incomplete file."""
    num_threads: Annotated[int, Within(0, 2**10)] = 0
    """CPU threads; 0 keeps the default of torch."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""


def encode(options: EncodeOptions) -> LatentIndex:
    """Encode images into a folder of latents, or the rest of them.

    Args:
        options: what to encode, how, and where to.

    Returns:
        The index of the folder.

    Raises:
        ValueError: an option is wrong, the images do not fit the autoencoder, or the folder holds other latents.
        ImportError: a package is missing; names the extra.
    """
    for name, what in (("vae", "the folder of an autoencoder"), ("data_dir", "images"), ("out", "a folder")):
        if not getattr(options, name):
            raise invalid(name, "", f"--{name}: {what}")
    folder = Path(options.out)
    check_writable(folder)
    autoencoder = Autoencoder.load(options.vae, named_device(options.device))
    dataset = load_dataset(
        options.data_dir,
        image_size=options.image_size or None,
        class_cond=None,
        on_corrupt=options.on_corrupt,
        in_channels=int(autoencoder.model.config.in_channels),
        background=options.background,
    ).without_corrupt()
    index = plan_encoding(
        dataset,
        autoencoder,
        store=options.store,
        flips=options.flips,
        dtype=options.stored_dtype,
        seed=options.seed,
        shard_images=options.shard_images,
        scaling_factor=options.scaling_factor,
        data={name: getattr(options, name) for name in ("data_dir", "on_corrupt", "background")},
    )
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, "out"), Progress("encoding images", index.images, unit="image") as shown:
        index = started(folder, index)
        remove_leftovers(folder)
        if index.encoded:
            print(f"{index.encoded} of {index.images} images are encoded already", flush=True)
            shown.update(index.encoded)
        index = encode_rest(dataset, autoencoder, folder, index, batch_size=options.batch_size, on_images=shown.update)
    if dataset.skipped:
        print(f"left out {dataset.skipped} corrupt image{'s' if dataset.skipped > 1 else ''}", flush=True)
    return index


def _encode(arguments: list[str]) -> None:
    values: dict[str, Any] = parse_flags(
        {"encoding": EncodeOptions},
        arguments,
        defaults={},
        prog="python -m tdc_fast.encode",
        description="Encode images into latents with an autoencoder of diffusers.",
    )
    options = EncodeOptions(**values)
    use_threads(options.num_threads)
    index = encode(options)
    space = index.space
    print(f"latents: {options.out}, {index.store} of {index.images} images, {space.size}x{space.size}x{space.channels}")
    print(f"next:    python -m tdc_fast.train --latents {options.out} ...")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, encode, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_encode, argv, stopped=STOPPED["encode"])
