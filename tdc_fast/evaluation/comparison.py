"""Compare two sets of images: all metrics with their noise floors, and the denoising loss of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.data.dataset import ImageDataset
from tdc_fast.errors import invalid
from tdc_fast.evaluation.classifier import train_classifier
from tdc_fast.evaluation.features import RandomConvFeatures
from tdc_fast.evaluation.frechet import real_floors
from tdc_fast.evaluation.heldout import heldout_losses
from tdc_fast.evaluation.image_sets import ImageSet, load_pair
from tdc_fast.evaluation.inception import load_inception
from tdc_fast.evaluation.options import EvaluateOptions
from tdc_fast.evaluation.scores import OTHERS, PUBLISHED, describe_metrics, metrics
from tdc_fast.evaluation.statistics import SetStatistics, gather_statistics
from tdc_fast.evaluation.statistics_files import cached_statistics, content_key
from tdc_fast.progress import Progress
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import named_device
from tdc_fast.runs.denoisers import TrainedDenoiser, split_of
from tdc_fast.runs.groups import build_groups
from tdc_fast.runs.limits import check_limits
from tdc_fast.runs.precision import named_dtype
from tdc_fast.runs.processes import one_process

FEW_IMAGES = 5000
_WIDE = 512  # features, above which a floor takes seconds per repetition


@one_process
def evaluate(
    a: str, b: str, options: EvaluateOptions | None = None, *, extractor: nn.Module | None = None
) -> dict[str, Any]:
    """Compare two sets of images.

    The reference, whose images count as the real ones, is the set that is not a run; if both or neither are runs, the
    one that comes with statistics; else the second. Its statistics in Inception's features are kept in a cache.

    Args:
        a: folder, array file, name of a dataset, or run directory; a run is sampled, and its denoising loss measured.
        b: the same.
        options: how to sample and compare; None takes the defaults.
        extractor: a feature extractor of your own instead of `options.features`: a module on the CPU that maps images
            (B, C, H, W) uint8 to features (B, F), perhaps with a text `description`; see `gather_statistics`.

    Returns:
        All numbers, as evaluation.json holds them.

    Raises:
        ValueError: a set is missing or does not fit the other one, or an option is out of range.
    """
    options = options or EvaluateOptions()
    check_limits(EvaluateOptions, vars(options))
    device = named_device(options.device)
    named_dtype(options.dtype, device, False)  # refused before a run is sampled
    _check_features(options, extractor)
    if extractor is None and options.inception_weights:
        extractor = load_inception(options.inception_weights)
    published = bool(getattr(extractor, "published", False))
    first, second = load_pair(a, b, options, with_statistics=hasattr(extractor, "outputs"))
    if extractor is None:
        shape = next(images.shape for images in (first, second) if images.pixels is not None)
        extractor, description = _small_extractor(shape, options.features)
    else:
        description = str(getattr(extractor, "description", type(extractor).__name__))
    reference, compared = (first, second) if _is_reference(first, second) else (second, first)
    _check_lengths((first, second), extractor)
    extractor = extractor.to(device)
    statistics = _statistics(reference, extractor, options, device, keep=True)
    found = metrics(
        statistics,
        _statistics(compared, extractor, options, device, keep=False),
        published=published,
        seed=options.seed,
    )
    features = statistics.features
    result: dict[str, Any] = {
        "version": 1,
        "a": _described(a, first),
        "b": _described(b, second),
        "frechet_distance": found[(PUBLISHED if published else OTHERS).distance],
        "metrics": found,
        "feature_space": description,
        "floors_of": reference.name,
        "floors": []
        if features is None or len(features) < 4 or not len(compared)
        else [
            floor.to_json()
            for floor in real_floors(
                features.double(), bootstrap_n=len(compared), repetitions=2 if features.shape[1] > _WIDE else 8
            )
        ],
        "few_images": any(0 < len(images) < FEW_IMAGES for images in (first, second)),
    }
    if first.denoiser or second.denoiser:
        result["sampler"] = {
            "name": options.sampler,
            "steps": options.steps,
            "spacing": options.spacing,
            "seed": options.seed,
            "guidance_scale": options.guidance_scale,
            "labels": options.labels,
        }
    result["losses"] = {
        own.name: _losses(own.denoiser, other, options)
        for own, other in ((first, second), (second, first))
        if own.denoiser is not None
    }
    return result


def _check_features(options: EvaluateOptions, extractor: nn.Module | None) -> None:
    if extractor is not None:
        if options.features != "auto" or options.inception_weights:
            raise invalid("extractor", type(extractor).__name__, "None, where options name the feature space")
    elif options.features == "inception" and not options.inception_weights:
        raise invalid("features", "inception", "--inception_weights with it: a file, or download")
    elif options.features not in ("auto", "inception") and options.inception_weights:
        raise invalid("inception_weights", options.inception_weights, f"none with --features {options.features}")


def _check_lengths(sets: Sequence[ImageSet], extractor: nn.Module) -> None:
    """Refuse stored statistics of other features than the extractor's, before images go through it."""
    length = getattr(extractor, "num_features", None)
    for images in sets:
        found = None if images.statistics is None else len(images.statistics.moments.mean)
        if length is not None and found not in (None, length):
            raise invalid(
                "reference", f"{images.name}: statistics of {found} features", f"{length}, as the extractor gives"
            )


def _is_reference(first: ImageSet, second: ImageSet) -> bool:
    """Whether the first of two sets is the reference."""
    if (first.denoiser is None) != (second.denoiser is None):
        return first.denoiser is None
    return first.statistics is not None and second.statistics is None


def _statistics(
    images: ImageSet, extractor: nn.Module, options: EvaluateOptions, device: torch.device, *, keep: bool
) -> SetStatistics:
    """The statistics of a set; those that came with it instead of those of its images, where there are both."""
    stored = images.statistics
    if images.pixels is None:
        assert stored is not None
        return stored
    at_once = min(options.batch_size, getattr(extractor, "images_at_once", options.batch_size))

    fingerprint = getattr(extractor, "fingerprint", "")

    def gather() -> SetStatistics:
        shown = bool(fingerprint)  # the extractors of this package that have none are done in seconds
        with Progress(f"features of {images.name}", -(-len(images) // at_once), shown=shown) as progress:

            def batches() -> Iterator[Tensor]:
                for batch in images.batches(at_once):
                    yield batch.to(device)
                    progress.update()  # when the next one is asked for

            return gather_statistics(batches(), len(images), extractor, kept=options.kept_features, seed=options.seed)

    if not (keep and fingerprint and isinstance(images.pixels, ImageDataset)):
        found = gather()
    else:
        settings = (fingerprint, images.channels, images.background, options.kept_features, options.seed, device.type)
        found, path, was_there = cached_statistics(content_key(images.name, images.pixels, *settings), gather)
        if was_there:
            print(f"statistics of {images.name}: read from {path}", flush=True)
    if stored is None:
        return found
    return SetStatistics(stored.moments, stored.spatial, found.features, found.score)


def _described(name: str, images: ImageSet) -> dict[str, Any]:
    known: dict[str, Any] = {"name": name, "images": len(images), "is_run": images.denoiser is not None}
    if images.statistics is not None:
        known["statistics"] = "from the file"
    return known if images.denoiser is None else {**known, "dtype": images.denoiser.dtype}


def _small_extractor(shape: tuple[int, int, int], features: str) -> tuple[nn.Module, str]:
    fits = shape == (1, 8, 8)
    if features == "digits" and not fits:
        raise invalid("features", features, f"random-conv for images of shape {shape}")
    if features == "random-conv" or not fits:
        return RandomConvFeatures(shape[0]), RandomConvFeatures.description
    trained = train_classifier()
    return trained.model, f"{trained.model.description} (held-out accuracy {trained.accuracy:.1%})"


def _losses(denoiser: TrainedDenoiser, other: ImageSet, options: EvaluateOptions) -> dict[str, Any]:
    """The denoising loss of a run by group: on its held-out images if it has any, else on the other set."""
    config = denoiser.config
    steps = denoiser.diffusion.num_timesteps
    groups = denoiser.run.groups if denoiser.run else build_groups(config)
    if groups is None or groups.num_timesteps != steps:  # uniform training, or on a subset of the timesteps
        groups = TimestepGroups.uniform(steps, min(4, steps))
    if config.heldout:
        try:
            heldout = split_of(denoiser)[1]
        except ValueError as error:  # of images that moved or changed; the distances are measured already
            return {"skipped": str(error)}
        assert heldout is not None
        x0, kwargs = heldout.batch(slice(0, options.loss_images))
        images = f"the first {len(x0)} held-out images of {config.latents or config.data_dir}"
    elif denoiser.num_classes or denoiser.latents is not None or other.denoiser is not None or other.pixels is None:
        return {"skipped": "the run has no held-out images (--heldout 0)"}
    else:
        x0, kwargs = other.read(slice(0, options.loss_images)).float() / 127.5 - 1, {}
        images = f"the first {len(x0)} images of {other.name} (the run has no held-out images)"
    if tuple(x0.shape[1:]) != denoiser.image_shape:
        return {"skipped": f"the images of {other.name} differ in shape from the run's"}
    device = next(denoiser.model.parameters()).device
    losses = heldout_losses(
        denoiser.model,
        denoiser.diffusion,
        x0.to(device),
        groups,
        model_kwargs={name: value.to(device) for name, value in kwargs.items()},
        seed=options.seed,
        batch_size=options.batch_size,
    )
    return {**losses.to_json(), "images": images, "boundaries": list(groups.boundaries)}


def describe(result: dict[str, Any]) -> str:
    """The numbers that `evaluate` returned, as lines of text."""
    lines = [
        *(f"{name.upper()}: {result[name]['name']} ({_count(result[name])})" for name in ("a", "b")),
        *describe_metrics(result["metrics"]),
        f"  feature space: {result['feature_space']}",
        f"  reference: {result['floors_of']}",
    ]
    for floor in result["floors"]:
        lines.append(
            f"  {result['floors_of']} against itself, {floor['kind']} of {floor['n']}: "
            f"{floor['mean']:.4f} ({floor['min']:.4f} to {floor['max']:.4f})"
        )
    if result["few_images"]:
        lines.append(f"  a set has fewer than {FEW_IMAGES} images: compare only with distances of equally large sets")
    for name, losses in result["losses"].items():
        if "skipped" in losses:
            lines.append(f"denoising loss of {name}: not measured, {losses['skipped']}")
            continue
        groups = ", ".join(f"{value:.5f}" for value in losses["per_group"])
        lines.append(f"denoising loss of {name}: {losses['mean']:.5f}; by group: {groups}")
        lines.append(f"  on {losses['images']}, fixed noise, groups at {losses['boundaries']}")
    return "\n".join(lines)


def _count(described: dict[str, Any]) -> str:
    if "statistics" not in described:
        return f"{described['images']} images"
    return f"statistics from the file, {described['images']} images" if described["images"] else "statistics only"
