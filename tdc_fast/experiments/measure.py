"""Measure every finished model in the same way: held-out loss, samples, Fréchet distance, MACs per image."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.atomic import atomic_file
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.image_sources import OnCorrupt
from tdc_fast.data.pixels import to_uint8
from tdc_fast.diffusion.samplers import SamplerName, sampling_steps
from tdc_fast.evaluation.classifier import DigitsClassifier, train_classifier
from tdc_fast.evaluation.features import RandomConvFeatures, extract
from tdc_fast.evaluation.frechet import Floor, frechet_distance, real_floors
from tdc_fast.evaluation.heldout import HeldoutLosses, heldout_losses, sampling_macs
from tdc_fast.evaluation.samples import draw_samples, write_samples
from tdc_fast.nn.casts import InDtype
from tdc_fast.nn.merging import Merging
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_device
from tdc_fast.runs.denoisers import TrainedDenoiser, from_run, split_of
from tdc_fast.runs.loading import Run, load_run
from tdc_fast.runs.merged import merge_run
from tdc_fast.runs.weights import load_tensors

SAMPLER: SamplerName = "ddim"
GRID_IMAGES = 100


@dataclass(frozen=True)
class MeasuringProtocol:
    """How every model is measured.

    Attributes:
        draws: independent draws of samples.
        samples: images per draw.
        sampling_steps: DDIM steps.
        points_per_group: timesteps per interval at which the held-out loss is measured.
        boundaries: intervals of timesteps of the held-out loss.
        first_seed: seed of the first draw; the next ones count up.
        loss_seed: seed of the noise of the held-out loss.
    """

    draws: int
    samples: int
    sampling_steps: int
    points_per_group: int
    boundaries: tuple[int, ...]
    first_seed: int = 1000
    loss_seed: int = 2000


@dataclass(frozen=True)
class Measured:
    """The measurements of one model.

    Attributes:
        heldout: loss on held-out images.
        distances: Fréchet distance of each draw.
        samples: the first images of the first draw, (M, C, H, W) uint8, M at most 100.
        macs_per_image: MACs of sampling one image.
        parameters: parameters in use.
        time_share: estimated time of sampling one image as a share of the base's; None where none was estimated.
    """

    heldout: HeldoutLosses
    distances: tuple[float, ...]
    samples: Tensor
    macs_per_image: int
    parameters: int
    time_share: float | None = None


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        images: real images (M, C, H, W) uint8.
        extractor: the feature extractor.
        feature_space: its description.
        floors: distances between real images in this feature space.
    """

    images: Tensor
    extractor: nn.Module
    feature_space: str
    floors: tuple[Floor, ...]


def prepare_reference(
    path: Path, samples: int, data_dir: str = "digits", image_size: int = 8, on_corrupt: OnCorrupt = "error"
) -> None:
    """Choose the feature space, measure the floors of the distance, and write both to a file.

    The features of 8x8 digits come from a classifier trained on them, those of other images from a random network.

    Args:
        path: the file to write.
        samples: images per draw, which the floors depend on.
        data_dir: dataset of the real images.
        image_size: their size in pixels.
        on_corrupt: whether an image that cannot be decoded is an error or is left out.
    """
    content: dict[str, Any] = {"data_dir": data_dir, "image_size": image_size, "on_corrupt": on_corrupt}
    content["classifier"] = None
    images = _real_images(data_dir, image_size, on_corrupt)
    extractor: nn.Module
    if (data_dir, image_size) == ("digits", 8):
        trained = train_classifier()
        extractor, content["classifier"] = trained.model, trained.model.state_dict()
        content["feature_space"] = f"{trained.model.description}, {trained.accuracy:.1%} accurate on held-out digits"
    else:
        extractor = RandomConvFeatures(images.shape[1])
        content["feature_space"] = extractor.description
    floors = real_floors(extract(images, extractor), bootstrap_n=samples)
    content["floors"] = [(floor.kind, floor.n, list(floor.values)) for floor in floors]
    _save(path, content)


def load_reference(path: Path) -> Reference:
    """Read what `prepare_reference` wrote."""
    content = load_tensors(path)
    images = _real_images(content["data_dir"], content["image_size"], content.get("on_corrupt", "error"))
    extractor: nn.Module = RandomConvFeatures(images.shape[1])
    if content["classifier"] is not None:
        extractor = DigitsClassifier().eval().requires_grad_(False)
        extractor.load_state_dict(content["classifier"])
    floors = tuple(Floor(kind, n, tuple(values)) for kind, n, values in content["floors"])
    return Reference(images, extractor, content["feature_space"], floors)


def _real_images(data_dir: str, image_size: int, on_corrupt: OnCorrupt) -> Tensor:
    """All images of a named dataset, training and held out, as uint8 (M, C, H, W)."""
    return to_uint8(load_dataset(data_dir, image_size=image_size, on_corrupt=on_corrupt).without_corrupt().images())


def measure(
    run_directory: Path, reference: Path, protocol: MeasuringProtocol, path: Path, merging: Merging | None = None
) -> None:
    """Measure the model of a run and write the result to a file; the first draw goes to the run's samples/.

    Models run where and in the precision in which the run was trained.

    Args:
        run_directory: the run.
        reference: file that `prepare_reference` wrote.
        protocol: how to measure.
        path: the file to write.
        merging: measure the run's experts merged into one dense model; its draw goes to samples/ and the file's name.
    """
    trained = from_run(run_directory) if merging is None else merge_run(from_run(run_directory, "experts"), merging)
    device = build_device(trained.config)
    # A dense denoiser is routed as well, so that all models run on the same, faster kernels.
    model = _routed(trained).to(device)
    denoiser = replace(trained, model=InDtype(model, torch.bfloat16) if trained.config.mixed_precision else model)
    real = load_reference(reference)
    heldout_images = split_of(denoiser)[1]
    assert heldout_images is not None
    losses = heldout_losses(
        denoiser.model,
        denoiser.diffusion,
        heldout_images.batch(slice(None))[0].to(device),
        TimestepGroups(protocol.boundaries),
        points_per_group=protocol.points_per_group,
        seed=protocol.loss_seed,
    )
    distances: list[float] = []
    shown: Tensor | None = None
    for draw in range(protocol.draws):
        images, labels = draw_samples(
            denoiser,
            protocol.samples,
            sampler=SAMPLER,
            steps=protocol.sampling_steps,
            seed=protocol.first_seed + draw,
            device=str(device),
        )
        distances.append(frechet_distance(real.images, images, real.extractor))
        if shown is None:
            shown = images[:GRID_IMAGES]
            folder = run_directory / "samples"
            write_samples(folder if merging is None else folder / path.stem, images, labels)
    assert shown is not None
    steps = sampling_steps(denoiser.diffusion, SAMPLER, protocol.sampling_steps)
    timesteps = denoiser.diffusion.original_timesteps(torch.tensor(steps))
    content: dict[str, Any] = {
        "per_image": losses.per_image,
        "weights": list(losses.weights),
        "timesteps": [list(points) for points in losses.timesteps],
        "seed": losses.seed,
        "distances": distances,
        "samples": shown,
        "macs_per_image": sampling_macs(model, timesteps.to(device), denoiser.image_shape),
        "parameters": count_parameters(trained.model),
        "time_share": 1.0 if merging else sampling_time(load_run(run_directory), timesteps),
    }
    _save(path, content)


def load_measured(path: Path) -> Measured:
    """Read what `measure` wrote."""
    content = load_tensors(path)
    heldout = HeldoutLosses(
        per_image=content["per_image"],
        weights=tuple(content["weights"]),
        timesteps=tuple(tuple(points) for points in content["timesteps"]),
        seed=content["seed"],
    )
    return Measured(
        heldout=heldout,
        distances=tuple(content["distances"]),
        samples=content["samples"],
        macs_per_image=content["macs_per_image"],
        parameters=content["parameters"],
        time_share=content.get("time_share"),
    )


def base_time(run: Run) -> float | None:
    """The estimated nanoseconds of a run's whole base, as its experts' times are told; None where none are."""
    pruning = (run.macs or {}).get("phases", {}).get("pruning", {})
    return pruning.get("base_latency") if run.widths is not None and run.widths.latency else None


def sampling_time(run: Run, timesteps: Tensor) -> float | None:
    """The estimated time of a run's model over some timesteps as a share of the base's; None where none is estimated.

    A model whose experts are whole, or that has none, is the base.

    Args:
        run: the run.
        timesteps: those of the process that it was trained with, integers (S,).
    """
    if run.widths is None or run.groups is None:
        return 1.0
    base = base_time(run)
    times = [run.widths.latency[group] for group in run.groups.group_of(timesteps).tolist()] if base else []
    return statistics.fmean(times) / base if base else None


def _routed(denoiser: TrainedDenoiser) -> nn.Module:
    if isinstance(denoiser.model, RoutedModel):
        return denoiser.model
    groups = TimestepGroups.uniform(denoiser.diffusion.original_num_timesteps, 1)
    return pack_experts(denoiser.model, groups).eval()


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; of a routed model those of its experts as separate modules, without pruned channels.

    What groups share counts once, as wide as the widest of them.
    """
    if isinstance(model, RoutedModel):
        sizes: dict[tuple[str, int], int] = {}
        shared = model.shared
        for group in range(model.num_experts):
            for name, parameter in model.expert(group).named_parameters():
                rows = shared.get(name.rpartition(".")[0])
                key = name, group if rows is None else rows[group]
                sizes[key] = max(parameter.numel(), sizes.get(key, 0))
        return sum(sizes.values())
    return sum(parameter.numel() for parameter in model.parameters())


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(content, file)
