"""How good pruned candidates are: the seam, and the denoising loss of all of them in one routed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from tdc_fast.diffusion.calibration import Batch, draw_timesteps, split_batch
from tdc_fast.diffusion.protocols import DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.nn.units import Prunable, module_of
from tdc_fast.pruning.candidates import CandidateModel
from tdc_fast.pruning.task import Task, Widths


class Scorer(Protocol):
    samples: int
    """Forward passes of single samples that one candidate takes; they count as calibration."""

    def score(
        self, task: Task, candidates: Sequence[Widths], advance: Callable[[int], None] = lambda count: None
    ) -> Sequence[float]:
        """One number per candidate, lower is better; candidates come together so that they can share a launch.

        `advance` is told how many more candidates are done, for a progress bar.
        """


class DenoisingLoss:
    """Scores candidates by their denoising loss on calibration data at the group's timesteps, before fine-tuning.

    Every candidate sees the same data, timesteps and noise, which depend on `seed` alone. All candidates run in one
    routed batch (see `CandidateModel`), each on its own copy of the calibration batch; where that would be more than
    `max_samples` samples, in as few passes as stay below (one candidate at least, so a calibration batch is never cut).
    """

    def __init__(
        self,
        base: Prunable,
        diffusion: DiffusionProcess,
        batches: Iterable[Batch],
        *,
        max_batches: int = 8,
        seed: int = 0,
        max_samples: int = 1024,
    ) -> None:
        if max_samples < 1:
            raise invalid("max_samples", max_samples, "at least 1")
        self.base, self.diffusion, self.seed, self.max_samples = base, diffusion, seed, max_samples
        self.batches = list(islice(batches, max_batches))
        self.samples = sum(len(split_batch(batch)[0]) for batch in self.batches)
        self._orders: dict[str, tuple[int, ...]] = {}
        self._model: CandidateModel | None = None

    @torch.no_grad()
    def score(
        self, task: Task, candidates: Sequence[Widths], advance: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        model = self._of_orders({unit.name: task.order(unit.name) for unit in task.units})
        largest = max(len(split_batch(batch)[0]) for batch in self.batches)
        at_once = max(self.max_samples // largest, 1)
        passes = -(-len(candidates) // at_once)
        scores: list[float] = []
        for part in range(passes):  # of equal size, so that no pass is left with a single candidate
            chunk = candidates[len(candidates) * part // passes : len(candidates) * (part + 1) // passes]
            scores += self._losses(model, chunk, task.interval)
            advance(len(chunk))
        return scores

    def _of_orders(self, orders: dict[str, tuple[int, ...]]) -> CandidateModel:
        """The last model while the group stays the same: rounds differ in widths alone."""
        if self._model is None or orders != self._orders:
            self._model, self._orders = CandidateModel(self.base, orders), orders
        return self._model

    def _losses(self, model: CandidateModel, chunk: Sequence[Widths], interval: tuple[int, int]) -> list[float]:
        count, device = len(chunk), next(module_of(self.base).parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(count, dtype=torch.float64, device=device)
        with model.of_widths(chunk) as denoiser:
            for x0, kwargs in map(split_batch, self.batches):
                t, noise = draw_timesteps(x0, interval, generator)
                copies = {name: _copies(v, count, device) if _is_batch(v, x0) else v for name, v in kwargs.items()}
                x0, t, noise = (_copies(value, count, device) for value in (x0, t, noise))
                losses = self.diffusion.training_losses(denoiser, x0, t, noise=noise, model_kwargs=copies)["loss"]
                total += losses.double().view(count, -1).sum(1)
        return [float(value) for value in total / self.samples]


def _is_batch(value: Any, x0: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == x0.shape[:1]


def _copies(value: Tensor, count: int, device: torch.device) -> Tensor:
    """The batch `count` times over, candidate by candidate."""
    return value.to(device).repeat(count, *[1] * (value.dim() - 1))
