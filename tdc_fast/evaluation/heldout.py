"""The loss of a denoiser on held-out images, and the cost of sampling an image with it.

Noise comes from a seed, in an order that depends neither on the model nor on the batch size. Two models evaluated with
the same arguments therefore see the same noisy images, and their difference is far more precise than either loss alone:
`compare` returns it with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.protocols import Denoiser, DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.graphs import graphed
from tdc_fast.nn.macs import measure_macs
from tdc_fast.nn.modes import evaluating
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.processes import one_process


@dataclass(frozen=True)
class HeldoutLosses:
    """Denoising loss on images that were not trained on.

    Attributes:
        per_image: (N, M) float64, the loss of each image, averaged over the measured timesteps of each group.
        weights: share of each group in all timesteps.
        timesteps: the measured timesteps of each group.
        seed: seed of the noise.
    """

    per_image: Tensor
    weights: tuple[float, ...]
    timesteps: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def per_group(self) -> tuple[float, ...]:
        """Mean loss of each group."""
        return tuple(self.per_image.mean(dim=1).tolist())

    @property
    def mean(self) -> float:
        """Mean loss over all timesteps.

        Each group is weighted by its number of timesteps, so this estimates the loss at uniformly drawn timesteps for
        any groups.
        """
        return float(self.weighted_per_image().mean())

    @property
    def num_images(self) -> int:
        """Number of images M."""
        return self.per_image.shape[1]

    def weighted_per_image(self) -> Tensor:
        """Loss of each image over all timesteps, (M,) float64."""
        return torch.tensor(self.weights, dtype=torch.float64) @ self.per_image

    def to_json(self) -> dict[str, Any]:
        """The losses as report.json holds them, without those of single images."""
        return {
            "mean": self.mean,
            "per_group": list(self.per_group),
            "num_images": self.num_images,
            "timesteps_per_group": [len(points) for points in self.timesteps],
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Difference:
    """Relative difference of two losses.

    Attributes:
        relative: `candidate / baseline - 1`.
        standard_error: its standard error over the images.
    """

    relative: float
    standard_error: float

    def to_json(self) -> dict[str, float]:
        """The difference as report.json holds it."""
        return {"relative": self.relative, "standard_error": self.standard_error}


def timestep_grid(groups: TimestepGroups, points_per_group: int) -> tuple[tuple[int, ...], ...]:
    """Evenly spaced timesteps of each group: the middles of equal parts of its interval.

    Args:
        groups: the groups of timesteps.
        points_per_group: how many timesteps per group; a group with fewer contributes all of its timesteps.

    Raises:
        ValueError: `points_per_group` is below 1.
    """
    if points_per_group < 1:
        raise invalid("points_per_group", points_per_group, "at least 1 timestep for each group")
    grid = []
    for start, stop in groups:
        count = min(points_per_group, stop - start)
        grid.append(tuple(start + (2 * i + 1) * (stop - start) // (2 * count) for i in range(count)))
    return tuple(grid)


@one_process
def heldout_losses(
    model: Denoiser,
    diffusion: DiffusionProcess,
    x0: Tensor,
    groups: TimestepGroups,
    *,
    model_kwargs: Mapping[str, Tensor] | None = None,
    points_per_group: int = 25,
    seed: int = 0,
    batch_size: int = 512,
) -> HeldoutLosses:
    """Denoising loss of a model on held-out images, for each group of timesteps.

    Every image is noised once at every timestep of `timestep_grid(groups, points_per_group)`. For a model with
    learned variance only the mean squared error is measured, not the variational term, so that it compares with other
    models.

    Args:
        model: called as `model(x, t, **model_kwargs)`.
        diffusion: the diffusion process.
        x0: images (M, C, H, W) float32 in [-1, 1].
        groups: groups of all timesteps of `diffusion`.
        model_kwargs: tensors with leading dimension M, such as class labels `y`.
        points_per_group: timesteps measured in each group.
        seed: seed of the noise.
        batch_size: images at once; does not change the result.

    Raises:
        ValueError: `x0` is empty or not four-dimensional, or the groups do not match the diffusion's timesteps.
    """
    if x0.dim() != 4 or len(x0) == 0:
        raise invalid("x0", tuple(x0.shape), "at least one image, as a (M, C, H, W) tensor")
    generator = torch.Generator().manual_seed(seed)
    if groups.num_timesteps != diffusion.num_timesteps:
        raise invalid("groups", groups, f"groups of the {diffusion.num_timesteps} timesteps of diffusion")
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "at least 1")
    grid = timestep_grid(groups, points_per_group)

    def losses_of(batch: Tensor, t: Tensor, noise: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
        terms = diffusion.training_losses(model, batch, t, noise=noise, model_kwargs=kwargs)
        return terms["mse"] if "mse" in terms else terms["loss"]

    modules = [model] if isinstance(model, nn.Module) else []
    losses_of = graphed(losses_of, x0.device, name="the held-out loss", modules=modules)
    rows = []
    with evaluating(model), torch.no_grad():
        for points in grid:
            total = torch.zeros(len(x0), dtype=torch.float64)
            for timestep in points:
                # Drawn for all images at once on the CPU, so that it depends on neither batch size nor device.
                noise = torch.randn(x0.shape, generator=generator)
                total += _losses_at(losses_of, x0, noise, timestep, model_kwargs or {}, batch_size)
            rows.append(total / len(points))
    sizes = [stop - start for start, stop in groups]
    weights = tuple(size / sum(sizes) for size in sizes)
    return HeldoutLosses(torch.stack(rows), weights, grid, seed)


def _losses_at(
    losses_of: Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor],
    x0: Tensor,
    noise: Tensor,
    timestep: int,
    model_kwargs: Mapping[str, Tensor],
    batch_size: int,
) -> Tensor:
    parts = []
    for first in range(0, len(x0), batch_size):
        rows = slice(first, first + batch_size)
        batch = x0[rows]
        t = torch.full((len(batch),), timestep, dtype=torch.int64, device=x0.device)
        kwargs = {name: value[rows] for name, value in model_kwargs.items()}
        parts.append(losses_of(batch, t, noise[rows].to(x0.device), kwargs))
    return torch.cat(parts).double().cpu()


def compare(candidate: HeldoutLosses, baseline: HeldoutLosses) -> tuple[Difference, tuple[Difference, ...]]:
    """Relative difference of two models' losses, paired over images.

    The standard error is that of the mean paired difference, divided by the baseline's loss. It covers the choice of
    held-out images, not the training seed.

    Args:
        candidate: losses of the model in question.
        baseline: losses of the model it is compared with.

    Returns:
        The difference over all timesteps, and the differences of the groups.

    Raises:
        ValueError: the losses were not measured on the same images, timesteps and noise.
    """
    if (candidate.timesteps, candidate.seed) != (baseline.timesteps, baseline.seed):
        raise invalid("candidate", f"seed {candidate.seed}", "losses measured with the baseline's seed and timesteps")
    if candidate.num_images != baseline.num_images:
        raise invalid("candidate", f"{candidate.num_images} images", f"the baseline's {baseline.num_images} images")
    overall = _paired(candidate.weighted_per_image(), baseline.weighted_per_image())
    per_group = tuple(
        _paired(ours, theirs) for ours, theirs in zip(candidate.per_image, baseline.per_image, strict=True)
    )
    return overall, per_group


def _paired(candidate: Tensor, baseline: Tensor) -> Difference:
    reference = float(baseline.mean())
    difference = candidate - baseline
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")
    return Difference(float(difference.mean()) / reference, error / reference)


def sampling_macs(model: nn.Module, timesteps: Tensor, image_shape: tuple[int, int, int]) -> int:
    """MACs of sampling one image, counted by torch's FlopCounterMode.

    The model is called once on a batch with one image at each timestep, so a routed model spends on each timestep what
    the expert of that timestep costs.

    Args:
        model: the denoiser, dense or routed.
        timesteps: (S,) int64, the original timesteps at which the sampler calls the model; a timestep at which it calls
            the model twice appears twice.
        image_shape: (C, H, W).

    Returns:
        MACs of the whole chain; divided by S, the mean cost of a step.

    Raises:
        ValueError: `timesteps` is empty or not one-dimensional.
    """
    if timesteps.dim() != 1 or len(timesteps) == 0:
        raise invalid("timesteps", tuple(timesteps.shape), "the sampler's timesteps, as a (S,) tensor")
    x = torch.zeros(len(timesteps), *image_shape, device=timesteps.device)
    with evaluating(model):
        return measure_macs(model, x, timesteps)
