"""Compare two sets of images: their Fréchet distance with its noise floors, and the denoising loss of runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.evaluation.classifier import train_classifier
from tdc_fast.evaluation.features import RandomConvFeatures, extract
from tdc_fast.evaluation.frechet import frechet_distance, real_floors
from tdc_fast.evaluation.heldout import heldout_losses
from tdc_fast.evaluation.image_sets import ImageSet, load_pair
from tdc_fast.evaluation.options import EvaluateOptions
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import named_device, split_data
from tdc_fast.runs.denoisers import TrainedDenoiser
from tdc_fast.runs.groups import build_groups
from tdc_fast.runs.limits import check_limits
from tdc_fast.runs.precision import named_dtype
from tdc_fast.runs.processes import one_process

FEW_IMAGES = 5000


@one_process
def evaluate(a: str, b: str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Compare two sets of images.

    The floors of the distance are measured on the set that is not a run; if both or neither are runs, on the second.

    Args:
        a: folder, array file, name of a dataset, or run directory; a run is sampled, and its denoising loss measured.
        b: the same.
        options: how to sample and compare; None takes the defaults.

    Returns:
        All numbers, as evaluation.json holds them.

    Raises:
        ValueError: a set is missing or does not fit the other one, or an option is out of range.
    """
    options = options or EvaluateOptions()
    check_limits(EvaluateOptions, vars(options))
    named_dtype(options.dtype, named_device(options.device), False)  # refused before a run is sampled
    first, second = load_pair(a, b, options)
    extractor, description = _extractor(first.images, options.features)
    reference = first if second.denoiser is not None and first.denoiser is None else second
    compared = second if reference is first else first
    features = extract(reference.images, extractor, options.batch_size)
    result: dict[str, Any] = {
        "version": 1,
        "a": _described(a, first),
        "b": _described(b, second),
        "frechet_distance": frechet_distance(first.images, second.images, extractor, batch_size=options.batch_size),
        "feature_space": description,
        "floors_of": reference.name,
        "floors": [floor.to_json() for floor in real_floors(features, bootstrap_n=len(compared.images))]
        if len(features) >= 4
        else [],
        "few_images": min(len(first.images), len(second.images)) < FEW_IMAGES,
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


def _described(name: str, images: ImageSet) -> dict[str, Any]:
    known = {"name": name, "images": len(images.images), "is_run": images.denoiser is not None}
    return known if images.denoiser is None else {**known, "dtype": images.denoiser.dtype}


def _extractor(images: Tensor, features: str) -> tuple[nn.Module, str]:
    fits = images.shape[1:] == (1, 8, 8)
    if features == "digits" and not fits:
        raise invalid("features", features, f"random-conv for images of shape {tuple(images.shape[1:])}")
    if features == "random-conv" or not fits:
        return RandomConvFeatures(images.shape[1]), RandomConvFeatures.description
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
        heldout = split_data(config)[1]
        assert heldout is not None
        x0, kwargs = heldout.batch(slice(0, options.loss_images))
        images = f"the first {len(x0)} held-out images of {config.data_dir}"
    elif denoiser.num_classes or other.denoiser is not None:
        return {"skipped": "the run has no held-out images (--heldout 0)"}
    else:
        x0, kwargs = other.images[: options.loss_images].float() / 127.5 - 1, {}
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
        lines.append(f"  a set has fewer than {FEW_IMAGES} images: compare only with distances of equally large sets")
    for name, losses in result["losses"].items():
        if "skipped" in losses:
            lines.append(f"denoising loss of {name}: not measured, {losses['skipped']}")
            continue
        groups = ", ".join(f"{value:.5f}" for value in losses["per_group"])
        lines.append(f"denoising loss of {name}: {losses['mean']:.5f}; by group: {groups}")
        lines.append(f"  on {losses['images']}, fixed noise, groups at {losses['boundaries']}")
    return "\n".join(lines)
