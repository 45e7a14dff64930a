"""How good is a denoiser: its loss on held-out images, and what a forward pass of its sampler costs.

The held-out loss draws its noise and timesteps once from a seed, in an order that depends neither on the model nor on
the batch size. Two models evaluated with the same arguments therefore see the same noisy images, and their difference
is far more precise than either loss alone: `compare` gives it with its standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.macs import measure_macs
from tdc_fast.nn.modes import evaluating

if TYPE_CHECKING:
    from tdc_fast.diffusion import Diffusion
    from tdc_fast.routing import TimestepGroups

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class HeldoutLosses:
    """Denoising loss on images that took no part in training.

    `per_image` (num_groups, M) float64 averages each image's loss over the group's timesteps; `per_group` and `mean`
    are its averages. `mean` weights each group by its number of timesteps, so it estimates the loss under timesteps
    drawn uniformly, whatever the groups.
    """

    per_image: Tensor
    weights: tuple[float, ...]
    timesteps: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def per_group(self) -> tuple[float, ...]:
        return tuple(self.per_image.mean(dim=1).tolist())

    @property
    def mean(self) -> float:
        return float(self.weighted_per_image().mean())

    @property
    def num_images(self) -> int:
        return self.per_image.shape[1]

    def weighted_per_image(self) -> Tensor:
        """(M,) loss of each image over all timesteps."""
        return torch.tensor(self.weights, dtype=torch.float64) @ self.per_image

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "per_group": list(self.per_group),
            "num_images": self.num_images,
            "timesteps_per_group": [len(points) for points in self.timesteps],
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Difference:
    """Relative difference of two losses, with the standard error over the images that both models saw."""

    relative: float
    standard_error: float

    def to_json(self) -> dict[str, float]:
        return {"relative": self.relative, "standard_error": self.standard_error}


def timestep_grid(groups: TimestepGroups, points_per_group: int) -> tuple[tuple[int, ...], ...]:
    """Evenly spaced timesteps of each group: the middles of `points_per_group` equal parts of its interval.

    A group with fewer timesteps than that is covered completely.
    """
    if points_per_group < 1:
        raise invalid("points_per_group", points_per_group, "at least 1 timestep for each group")
    grid = []
    for start, stop in groups:
        count = min(points_per_group, stop - start)
        grid.append(tuple(start + (2 * i + 1) * (stop - start) // (2 * count) for i in range(count)))
    return tuple(grid)


def heldout_losses(
    model: Denoiser,
    diffusion: Diffusion,
    x0: Tensor,
    groups: TimestepGroups,
    *,
    model_kwargs: Mapping[str, Tensor] | None = None,
    points_per_group: int = 25,
    seed: int = 0,
    batch_size: int = 512,
) -> HeldoutLosses:
    """Denoising loss of `model` on `x0` (M, C, H, W) float32 in [-1, 1], for each of `groups`.

    Every image is noised once at every timestep of `timestep_grid(groups, points_per_group)`. Where the loss also holds
    a variational term (learned variance), only its mean squared error is reported, so that models with and without it
    compare. `model_kwargs` holds tensors of leading dimension M (class labels as `y`). Raises ValueError if `x0` is
    empty or not four-dimensional.
    """
    if x0.dim() != 4 or len(x0) == 0:
        raise invalid("x0", tuple(x0.shape), "at least one image, as a (M, C, H, W) tensor")
    generator = torch.Generator().manual_seed(seed)
    if groups.num_timesteps != diffusion.num_timesteps:
        raise invalid("groups", groups, f"groups of the {diffusion.num_timesteps} timesteps of diffusion")
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "at least 1")
    grid = timestep_grid(groups, points_per_group)
    rows = []
    with evaluating(model), torch.no_grad():
        for points in grid:
            total = torch.zeros(len(x0), dtype=torch.float64)
            for timestep in points:
                # Noise comes from one CPU generator for all images at once: neither the batch size nor the device
                # changes what is drawn.
                noise = torch.randn(x0.shape, generator=generator)
                total += _losses_at(model, diffusion, x0, noise, timestep, model_kwargs or {}, batch_size)
            rows.append(total / len(points))
    sizes = [stop - start for start, stop in groups]
    weights = tuple(size / sum(sizes) for size in sizes)
    return HeldoutLosses(torch.stack(rows), weights, grid, seed)


def _losses_at(
    model: Denoiser,
    diffusion: Diffusion,
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
        terms = diffusion.training_losses(model, batch, t, noise=noise[rows].to(x0.device), model_kwargs=kwargs)
        parts.append(terms["mse"] if "mse" in terms else terms["loss"])
    return torch.cat(parts).double().cpu()


def compare(candidate: HeldoutLosses, baseline: HeldoutLosses) -> tuple[Difference, tuple[Difference, ...]]:
    """(overall, per group) relative difference `candidate / baseline - 1`, paired over images.

    The standard error is that of the mean paired difference, divided by the baseline's loss: it says how far other
    held-out images would move the number, not how far another training seed would. Raises ValueError if the two were
    not measured on the same draws.
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


def sampling_macs(
    model: nn.Module,
    timesteps: Tensor,
    image_shape: tuple[int, int, int],
    model_kwargs: Mapping[str, Tensor] | None = None,
) -> int:
    """Multiply-accumulates of one image's whole sampling chain, counted by torch's FlopCounterMode.

    `timesteps` (S,) int64 holds the original timesteps at which the sampler calls the model (a chain that calls it
    twice at one step lists that step twice); `image_shape` is (C, H, W). One batch holds one image at each of those
    timesteps, so a routed model spends on each exactly what that step's expert costs. `model_kwargs` holds tensors of
    leading dimension S. The result divided by S is the mean cost of a step.
    """
    if timesteps.dim() != 1 or len(timesteps) == 0:
        raise invalid("timesteps", tuple(timesteps.shape), "the sampler's timesteps, as a (S,) tensor")
    x = torch.zeros(len(timesteps), *image_shape, device=timesteps.device)
    with evaluating(model):
        return measure_macs(model, x, timesteps, **(model_kwargs or {}))
