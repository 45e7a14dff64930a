"""Compare two sets of images: `python -m tdc_fast.evaluate A B`, each a folder, an .npz or .npy file, `digits`,
`photos`, or a run directory, which is sampled first and whose denoising loss is measured as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tdc_fast.atomic import write_json
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.image_sources import list_images
from tdc_fast.data.pixels import to_uint8
from tdc_fast.diffusion.samplers import SamplerName
from tdc_fast.errors import invalid, require
from tdc_fast.evaluation.classifier import train_classifier
from tdc_fast.evaluation.frechet import RandomConvFeatures, extract, frechet_distance, real_floors
from tdc_fast.evaluation.heldout import heldout_losses
from tdc_fast.evaluation.samples import draw_samples
from tdc_fast.flags import parse_flags, use_threads
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import split_data
from tdc_fast.runs.denoisers import TrainedDenoiser, Which, from_run
from tdc_fast.runs.groups import build_groups

FEW_IMAGES = 5000


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """How two sets are compared."""

    features: Literal["auto", "digits", "random-conv"] = "auto"
    """Feature space of the distance. digits: 64 features of a classifier trained on scikit-learn's digits, for 8x8
    grey images; random-conv: 64 of a fixed random network; auto takes digits where it fits."""
    image_size: int = 0
    """Size that all images but a run's are scaled to; 0 takes the other set's for photos and a folder, else their
    own."""
    num_samples: int = 5000
    """Images drawn from a run."""
    which: Which = "auto"
    """With a run: its experts, its base, or (auto) the experts if there are any."""
    sampler: SamplerName = "ddim"
    """Sampler for a run."""
    steps: int = 25
    """Sampling steps for a run."""
    batch_size: int = 500
    """Images per batch, for sampling, features and losses."""
    loss_images: int = 512
    """At most this many images for a run's denoising loss."""
    seed: int = 0
    """Seed of sampling and of the loss's noise."""
    num_threads: int = 0
    """CPU threads; 0 leaves the setting of the process."""
    out: str = "evaluation.json"
    """File for the numbers."""


@dataclass(frozen=True)
class ImageSet:
    """Images to compare, uint8 (M, C, H, W), and the denoiser that drew them, if one did."""

    name: str
    images: Tensor
    denoiser: TrainedDenoiser | None = None


def evaluate(a: str, b: str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """All numbers about two sets, ready for JSON.

    The reference of the real-against-real floors is the set that is no run; of two alike, the second.
    Raises ValueError naming the set that is missing or does not fit the other.
    """
    options = options or EvaluateOptions()
    for name in ("num_samples", "steps", "batch_size", "loss_images"):
        if getattr(options, name) < 1:
            raise invalid(name, getattr(options, name), "a number above 0")
    first, second = load_pair(a, b, options)
    extractor, description = _extractor(first.images, options.features)
    reference = first if second.denoiser is not None and first.denoiser is None else second
    compared = second if reference is first else first
    features = extract(reference.images, extractor, options.batch_size)
    result: dict[str, Any] = {
        "version": 1,
        "a": {"name": a, "images": len(first.images), "is_run": first.denoiser is not None},
        "b": {"name": b, "images": len(second.images), "is_run": second.denoiser is not None},
        "frechet_distance": frechet_distance(first.images, second.images, extractor, batch_size=options.batch_size),
        "feature_space": description,
        "floors_of": reference.name,
        "floors": [floor.to_json() for floor in real_floors(features, bootstrap_n=len(compared.images))]
        if len(features) >= 4
        else [],
        "few_images": min(len(first.images), len(second.images)) < FEW_IMAGES,
    }
    if first.denoiser or second.denoiser:
        result["sampler"] = {"name": options.sampler, "steps": options.steps, "seed": options.seed}
    result["losses"] = {
        own.name: _losses(own.denoiser, other, options)
        for own, other in ((first, second), (second, first))
        if own.denoiser is not None
    }
    return result


def load_pair(a: str, b: str, options: EvaluateOptions) -> tuple[ImageSet, ImageSet]:
    """Both sets at one size and number of channels."""
    sets: dict[str, ImageSet] = {}
    size = options.image_size or None
    scaled = [name for name in (a, b) if name == "photos" or _is_folder(name)]
    for name in dict.fromkeys((a, b)):
        if name not in scaled:
            own = options.image_size or None
            sets[name] = _run_samples(name, options) if _is_run(name) else _read_images(name, own)
            size = size or sets[name].images.shape[-1]
    for name in scaled:
        size = size or _own_size(name)
        sets[name] = _read_images(name, size)
    first, second = _same_channels(sets[a], sets[b])
    if first.images.shape[1:] != second.images.shape[1:]:
        raise invalid(
            "b",
            f"{b}: images of shape {tuple(second.images.shape[1:])}",
            f"{tuple(first.images.shape[1:])}, as {a} has; --image_size scales what no run draws",
        )
    for name, images in ((a, first.images), (b, second.images)):
        if len(images) < 2:
            raise invalid(name, f"{len(images)} image", "at least 2 images")
    return first, second


def _is_run(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


def _is_folder(name: str) -> bool:
    return name not in ("digits", "photos") and Path(name).is_dir() and not _is_run(name)


def _own_size(folder: str) -> int | None:
    if folder == "photos":
        return None
    files = list_images(Path(folder))
    if not files:
        raise invalid("folder", folder, "a folder with jpg, jpeg, png or gif files, or a run directory")
    with require("PIL.Image", "demo").open(files[0]) as image:
        return min(image.size)


def _read_images(name: str, size: int | None) -> ImageSet:
    return ImageSet(name, to_uint8(load_dataset(name, image_size=size).images()))


def _run_samples(name: str, options: EvaluateOptions) -> ImageSet:
    denoiser = from_run(name, options.which)
    print(f"drawing {options.num_samples} images from {denoiser.name}: {options.sampler}, {options.steps} steps")
    images, _ = draw_samples(
        denoiser,
        options.num_samples,
        sampler=options.sampler,
        steps=min(options.steps, denoiser.diffusion.num_timesteps),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    return ImageSet(name, images, denoiser)


def _same_channels(first: ImageSet, second: ImageSet) -> tuple[ImageSet, ImageSet]:
    """A grey set beside an RGB one: as grey, where the RGB set holds grey images (a folder always reads as RGB)."""
    channels = {first.images.shape[1], second.images.shape[1]}
    if channels != {1, 3}:
        return first, second
    rgb = first if first.images.shape[1] == 3 else second
    is_grey = bool((rgb.images == rgb.images[:, :1]).all())

    def fitted(group: ImageSet) -> ImageSet:
        images = group.images[:, :1] if is_grey else group.images.expand(-1, 3, -1, -1)
        return ImageSet(group.name, images.contiguous(), group.denoiser)

    return fitted(first), fitted(second)


def _extractor(images: Tensor, features: str) -> tuple[nn.Module, str]:
    fits = images.shape[1:] == (1, 8, 8)
    if features == "digits" and not fits:
        raise invalid("features", features, f"random-conv for images of shape {tuple(images.shape[1:])}")
    if features == "random-conv" or not fits:
        return RandomConvFeatures(images.shape[1]), RandomConvFeatures.description
    trained = train_classifier()
    return trained.model, f"{trained.model.description} (held-out accuracy {trained.accuracy:.1%})"


def _losses(denoiser: TrainedDenoiser, other: ImageSet, options: EvaluateOptions) -> dict[str, Any]:
    """The denoising loss by group: on the run's held-out images, else on the other set's."""
    config = denoiser.config
    steps = denoiser.diffusion.num_timesteps
    groups = denoiser.run.groups if denoiser.run else build_groups(config)
    if groups is None or groups.num_timesteps != steps:  # uniform training, or on a subset of the timesteps
        groups = TimestepGroups.uniform(steps, min(4, steps))
    if config.heldout:
        heldout = split_data(config)[1]
        assert heldout is not None
        x0, kwargs = heldout.batch(slice(0, options.loss_images))
        images = f"the {len(x0)} first images that {config.data_dir} held out"
    elif denoiser.num_classes or other.denoiser is not None:
        return {"skipped": "the run held no images out (--heldout 0)"}
    else:
        x0, kwargs = other.images[: options.loss_images].float() / 127.5 - 1, {}
        images = f"the first {len(x0)} images of {other.name} (the run held none out)"
    if tuple(x0.shape[1:]) != denoiser.image_shape:
        return {"skipped": f"the images of {other.name} have another shape than the run's"}
    losses = heldout_losses(
        denoiser.model,
        denoiser.diffusion,
        x0,
        groups,
        model_kwargs=kwargs,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    return {**losses.to_json(), "images": images, "boundaries": list(groups.boundaries)}


def describe(result: dict[str, Any]) -> str:
    """The numbers as lines of text."""
    lines = [
        f"A: {result['a']['name']} ({result['a']['images']} images)",
        f"B: {result['b']['name']} ({result['b']['images']} images)",
        f"Fréchet distance: {result['frechet_distance']:.4f}",
        f"  feature space: {result['feature_space']}",
    ]
    for floor in result["floors"]:
        lines.append(
            f"  {result['floors_of']} against itself, {floor['kind']} of {floor['n']}: "
            f"{floor['mean']:.4f} ({floor['min']:.4f} to {floor['max']:.4f})"
        )
    if result["few_images"]:
        lines.append(f"  fewer than {FEW_IMAGES} images on a side: compare only with distances of the same numbers")
    for name, losses in result["losses"].items():
        if "skipped" in losses:
            lines.append(f"denoising loss of {name}: not measured, {losses['skipped']}")
            continue
        groups = ", ".join(f"{value:.5f}" for value in losses["per_group"])
        lines.append(f"denoising loss of {name}: {losses['mean']:.5f}; by group: {groups}")
        lines.append(f"  on {losses['images']}, fixed noise, groups at {losses['boundaries']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        names, flags = _split_names(arguments)
        values = parse_flags(
            {"evaluation": EvaluateOptions},
            flags,
            defaults={},
            prog="python -m tdc_fast.evaluate A B",
            description="Compare two of: folder of images, .npz or .npy file, digits, photos, run directory.",
        )
        options = EvaluateOptions(**values)
        if len(names) != 2:
            raise invalid("A B", names, "two of: folder, .npz or .npy file, digits, photos, run directory")
        use_threads(options.num_threads)
        if Path(options.out).is_dir():  # known before hours of sampling
            raise invalid("out", options.out, "the name of a file, such as evaluation.json in that folder")
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        result = evaluate(names[0], names[1], options)
        write_json(Path(options.out), result)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"tdc_fast.evaluate: {error}") from error
    print(describe(result))
    print(f"written to {options.out}")


def _split_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The two sets, wherever they stand among the flags, and the flags: every flag but --help takes one value."""
    names: list[str] = []
    flags: list[str] = []
    wants_value = False
    for token in arguments:
        if wants_value or token.startswith("-"):
            flags.append(token)
            wants_value = token.startswith("--") and "=" not in token and token != "--help" and not wants_value
        else:
            names.append(token)
    return names, flags


if __name__ == "__main__":
    main()
