"""Task similarity: which timesteps have similar loss gradients.

For every probe p (a short interval of timesteps) g_p is the gradient of the base's training loss over the calibration
data. The similarity of two probes is the cosine of their gradients (arXiv 2312.13307 groups by similarity; gradients
as the measure: H. Go et al., "Addressing Negative Transfer in Diffusion Models", arXiv 2306.00354). All probes see the
same images and the same noise, so the effect of the choice of data is common to all gradients.

A gradient is as large as the model. Only a fixed random projection of it to D numbers is kept: with random signs s_i,
element i is added to number i mod D. Signs are independent, so the inner product of two projections is that of the
gradients plus zero-mean noise of relative size about D ** -0.5 (the sketch of M. Charikar et al., 2002, with a fixed
assignment in place of the hash: no scatter, so the sums are deterministic on any device).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.atomic import write_json
from tdc_fast.diffusion.calibration import Batch, Calibration
from tdc_fast.diffusion.protocols import DiffusionProcess
from tdc_fast.errors import integer, invalid
from tdc_fast.grouping.intervals import Division, divide, scatter_of_similarity
from tdc_fast.grouping.probes import Probes
from tdc_fast.nn.inference import denoiser_in
from tdc_fast.nn.modes import evaluating
from tdc_fast.routing import TimestepGroups
from tdc_fast.text_files import read_json

_FORMAT_VERSION = 1
SKETCH_SIZE = 4099  # a prime, so that no layer's shape is a multiple of it


@dataclass(frozen=True)
class TaskSimilarity:
    """Cosine similarity of the gradients at P probes.

    Attributes:
        probes: the intervals of timesteps.
        matrix: cosines, float64 (P, P), symmetric, ones on the diagonal.
    """

    probes: Probes
    matrix: np.ndarray

    def divide(self, num_groups: int | None = None, *, max_groups: int = 10) -> Division:
        """The exact best division of the probes.

        Args:
            num_groups: N, or None for the elbow of the costs.
            max_groups: the largest number that the elbow may choose.
        """
        return divide(self._scatter(), num_groups, max_intervals=max_groups)

    def groups(self, num_groups: int | None = None, *, max_groups: int = 10) -> TimestepGroups:
        """The groups of `divide`, which takes the same arguments."""
        return self.probes.groups(self.divide(num_groups, max_groups=max_groups).cuts, "similarity")

    def refine(self, groups: TimestepGroups | Sequence[int], within: int) -> TimestepGroups:
        """The best groups whose inner boundaries lie near given ones, to the resolution of the probes.

        Args:
            groups: groups or boundaries given by hand; each boundary is rounded to the nearest edge of a probe.
            within: timesteps by which every inner boundary may move.

        Raises:
            ValueError: an argument is out of range.
        """
        within = integer("within", within, 0)
        boundaries = groups.boundaries if isinstance(groups, TimestepGroups) else groups
        cuts = self.probes.nearest_cuts(boundaries)
        step = self.probes.num_timesteps / len(self.probes)
        found = divide(self._scatter(), len(cuts) - 1, near=cuts, within=int(within / step))
        return self.probes.groups(found.cuts, "similarity")

    def _scatter(self) -> np.ndarray:
        return scatter_of_similarity(self.matrix, self.probes.sizes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON atomically."""
        rows = [[round(float(value), 6) for value in row] for row in self.matrix]
        write_json(Path(path), {"version": _FORMAT_VERSION, "edges": list(self.probes.edges), "cosines": rows})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskSimilarity:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, damaged or of another version; names it.
        """
        try:
            data = read_json(Path(path))
            if set(data) != {"version", "edges", "cosines"} or data["version"] != _FORMAT_VERSION:
                raise ValueError(f"not a similarity of version {_FORMAT_VERSION}")
            probes, matrix = Probes(tuple(data["edges"])), np.array(data["cosines"], dtype=np.float64)
            if matrix.shape != (len(probes), len(probes)) or not np.isfinite(matrix).all():
                raise ValueError(f"{len(probes)} probes and cosines of shape {matrix.shape}")
        except (OSError, ValueError, TypeError) as error:
            raise invalid("similarity file", f"{path}: {error}", "a file that TaskSimilarity.save wrote") from error
        return cls(probes, matrix)


def measure_similarity(
    model: nn.Module,
    diffusion: DiffusionProcess,
    batches: Iterable[Batch],
    *,
    num_probes: int = 50,
    max_batches: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TaskSimilarity:
    """Cosine similarity of the base's loss gradients at intervals of equal width.

    Args:
        model: the base. It is left unchanged.
        diffusion: the process that it was trained with.
        batches: x0 (B, ...) or (x0, model_kwargs).
        num_probes: P, the number of intervals.
        max_batches: how many batches are read.
        seed: seed of timesteps, noise and projection.
        dtype: what the base computes in, as `tdc_fast.nn.inference.denoiser_in` takes it.

    Raises:
        ValueError: there are more probes than timesteps or no data, or a gradient is zero or not finite.
    """
    probes = Probes.evenly(diffusion.num_timesteps, num_probes)
    data = list(islice(batches, max_batches))
    if not data:
        raise invalid("batches", data, "at least one batch of calibration data")
    gradients = mean_gradients(model, diffusion, dtype)
    sketches = torch.stack([gradient_sketch(gradients, model, data, probe, seed) for probe in probes])
    norms = sketches.norm(dim=1)
    for probe, norm in zip(probes, norms.tolist(), strict=True):
        if not 0 < norm < float("inf"):
            raise invalid("model", f"a gradient of norm {norm} at timesteps {probe}", "a trained base of finite loss")
    units = (sketches / norms[:, None]).cpu().numpy()
    matrix = np.clip(units @ units.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return TaskSimilarity(probes, (matrix + matrix.T) / 2)


def mean_gradients(
    model: nn.Module, diffusion: DiffusionProcess, dtype: torch.dtype = torch.float32
) -> Calibration[tuple[Tensor | None, ...]]:
    """The gradients of a batch's mean loss, one per parameter."""
    parameters = list(model.parameters())

    def of(losses: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(losses.mean(), parameters, allow_unused=True)

    return Calibration(model, diffusion, of, denoiser_in(model, dtype))


def gradient_sketch(
    gradients: Calibration[tuple[Tensor | None, ...]],
    model: nn.Module,
    batches: Sequence[Batch],
    probe: tuple[int, int],
    seed: int = 0,
) -> Tensor:
    """The random projection of the loss gradient at the timesteps of a probe, float64 (SKETCH_SIZE,).

    Args:
        gradients: what `mean_gradients` returned for the model.
        model: the base. It is left unchanged.
        batches: x0 (B, ...) or (x0, model_kwargs).
        probe: timesteps (start, stop).
        seed: seed of timesteps, noise and projection.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    sketch = torch.zeros(SKETCH_SIZE, dtype=torch.float64, device=parameters[0].device)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for grads in gradients.of(batches, probe, seed=seed):
                sketch += _sketch(grads, parameters, seed)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    return sketch


def _sketch(grads: Sequence[Tensor | None], parameters: Sequence[Tensor], seed: int) -> Tensor:
    signs = torch.Generator().manual_seed(seed)
    total = torch.zeros(SKETCH_SIZE, dtype=torch.float64, device=parameters[0].device)
    begin = 0
    for grad, parameter in zip(grads, parameters, strict=True):
        count = parameter.numel()
        sign = torch.randint(0, 2, (count,), generator=signs, dtype=torch.int8)  # CPU: the same on all devices
        if grad is not None:
            values = grad.reshape(-1).double() * (sign.to(grad.device) * 2 - 1)
            padded = torch.nn.functional.pad(values, (begin % SKETCH_SIZE, -(begin + count) % SKETCH_SIZE))
            total += padded.view(-1, SKETCH_SIZE).sum(0)
        begin += count
    return total
