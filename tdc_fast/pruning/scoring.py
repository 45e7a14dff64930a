"""Scores of pruned candidates: the protocol, and the denoising loss of all candidates in one routed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.calibration import Batch, draw_timesteps, split_batch
from tdc_fast.diffusion.protocols import Denoiser, DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.graphs import graphed
from tdc_fast.nn.units import Prunable, module_of
from tdc_fast.pruning.candidates import CandidateModel
from tdc_fast.pruning.task import Task, Widths


class Scorer(Protocol):
    """Rates candidates.

    Attributes:
        samples: samples that one candidate is run on; their MACs count as calibration.
    """

    samples: int

    def score(
        self, task: Task, candidates: Sequence[Widths], advance: Callable[[int], None] = lambda count: None
    ) -> Sequence[float]:
        """One number per candidate, lower is better.

        Args:
            task: the group's task.
            candidates: their widths, all at once so that they can share kernel launches.
            advance: called with the number of candidates scored since its last call, for a progress bar.
        """


class DenoisingLoss:
    """Scores candidates by their denoising loss on calibration data at the group's timesteps, before fine-tuning.

    Every candidate sees the same data, timesteps and noise. All candidates run in one routed batch (see
    `CandidateModel`), each on its own copy of the calibration batch. Where that would exceed `max_samples`, they
    run in several passes of at least one candidate, so a calibration batch is never split.

    Args:
        base: the trained denoiser. It is not changed.
        diffusion: the process that it was trained with.
        batches: calibration data, x0 (B, ...) or (x0, model_kwargs).
        max_batches: how many of them are read.
        seed: seed of timesteps and noise.
        max_samples: samples that one pass may hold.
        dtype: what the candidates compute in; losses are computed in fp32.
    """

    def __init__(
        self,
        base: nn.Module | Prunable,
        diffusion: DiffusionProcess,
        batches: Iterable[Batch],
        *,
        max_batches: int = 8,
        seed: int = 0,
        max_samples: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_samples < 1:
            raise invalid("max_samples", max_samples, "at least 1")
        self.base, self.diffusion, self.seed, self.max_samples = base, diffusion, seed, max_samples
        self.batches = list(islice(batches, max_batches))
        self.samples = sum(len(split_batch(batch)[0]) for batch in self.batches)
        self._dtype = dtype
        self._orders: dict[str, tuple[int, ...]] = {}
        self._model: CandidateModel | None = None
        self._candidate_losses: Callable[..., Tensor] = self._training_losses

    @torch.no_grad()
    def score(
        self, task: Task, candidates: Sequence[Widths], advance: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """Mean loss of every candidate; arguments as in `Scorer.score`."""
        model = self._of_orders({unit.name: task.order(unit.name) for unit in task.units})
        largest = max(len(split_batch(batch)[0]) for batch in self.batches)
        at_once = max(self.max_samples // largest, 1)
        passes = -(-len(candidates) // at_once)
        scores: list[float] = []
        for part in range(passes):  # of equal size, so that no pass has a single candidate left over
            chunk = candidates[len(candidates) * part // passes : len(candidates) * (part + 1) // passes]
            scores += self._losses(model, chunk, task.interval)
            advance(len(chunk))
        return scores

    def _of_orders(self, orders: dict[str, tuple[int, ...]]) -> CandidateModel:
        """The previous model while the group stays the same, since rounds differ only in widths."""
        if self._model is None or orders != self._orders:
            self._model, self._orders = CandidateModel(self.base, orders, self._dtype), orders
            # Without its modules: their hooks are those of CandidateModel, which a graph may hold.
            device = next(module_of(self.base).parameters()).device
            self._candidate_losses = graphed(self._training_losses, device, name="the scores of candidates")
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
                losses = self._candidate_losses(denoiser, x0, t, noise, copies)
                total += losses.double().view(count, -1).sum(1)
        return [float(value) for value in total / self.samples]

    def _training_losses(
        self, denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        return self.diffusion.training_losses(denoiser, x0, t, noise=noise, model_kwargs=model_kwargs)["loss"]


def _is_batch(value: Any, x0: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == x0.shape[:1]


def _copies(value: Tensor, count: int, device: torch.device) -> Tensor:
    """The batch `count` times over, candidate by candidate."""
    return value.to(device).repeat(count, *[1] * (value.dim() - 1))
