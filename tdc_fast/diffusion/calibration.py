"""Denoising losses on calibration data, with the same timesteps and noise for every model that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.protocols import Denoiser, DiffusionProcess
from tdc_fast.graphs import graphed

Batch = Tensor | tuple[Tensor, Mapping[str, Any]]
R = TypeVar("R")


class Calibration(Generic[R]):
    """What a function makes of the training losses of calibration data, group by group.

    On a GPU the losses and the function are captured once per shape of the batches (`tdc_fast.graphs`).

    Args:
        model: the denoiser, a dense one, whose hooks, mode and gradients are the caller's.
        diffusion: the process.
        function: takes the training losses (B,) of a batch, and returns tensors without gradients, in any nesting. They
            hold until the next batch. None returns the losses themselves; grad mode must then be off.
        denoise: computes the model, such as in another precision; None calls the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: DiffusionProcess,
        function: Callable[[Tensor], R] | None = None,
        denoise: Denoiser | None = None,
    ) -> None:
        self._denoise, self._diffusion, self._function = denoise or model, diffusion, function
        self._device = next(model.parameters()).device
        options = {"modules": [model], "clone": False, "fixed_flops": True}
        self._run = graphed(self._of_a_batch, self._device, name="calibration", **options)

    def of(self, batches: Iterable[Batch], group: tuple[int, int], *, seed: int = 0) -> Iterator[R]:
        """The function's result for each batch at timesteps of a group, on the model's device.

        Each batch spreads its timesteps evenly over the group. Timesteps and noise depend only on `seed` and the
        batches' shapes, so that groups and models are compared on the same draws.

        Args:
            batches: clean samples (B, C, ...), each alone or with the model's further arguments.
            group: timesteps start to stop - 1.
            seed: of timesteps and noise.
        """
        generator, device = torch.Generator().manual_seed(seed), self._device
        for x0, kwargs in map(split_batch, batches):
            t, noise = draw_timesteps(x0, group, generator)
            there = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
            yield self._run(x0.to(device), t.to(device), noise.to(device), there)

    def _of_a_batch(self, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: dict[str, Any]) -> Any:
        losses = self._diffusion.training_losses(self._denoise, x0, t, noise=noise, model_kwargs=model_kwargs)["loss"]
        return losses if self._function is None else self._function(losses)


def split_batch(batch: Batch) -> tuple[Tensor, Mapping[str, Any]]:
    """Clean samples x0 and model_kwargs of a batch, which is x0 alone or that pair."""
    if isinstance(batch, Tensor):
        return batch, {}
    x0, kwargs = batch
    return x0, kwargs or {}


def draw_timesteps(x0: Tensor, group: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Timesteps spread evenly over a group, and noise.

    Args:
        x0: clean samples (B, C, ...).
        group: timesteps start to stop - 1, of which each of B equal parts gets one draw.
        generator: where random numbers come from.

    Returns:
        Timesteps, int64 (B,), in random order, and noise like x0.
    """
    start, stop = group
    count = x0.shape[0]
    shares = (torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=generator)) / max(count, 1)
    t = start + (shares * (stop - start)).long().clamp_(max=stop - start - 1)
    t = t[torch.randperm(count, generator=generator)]
    return t, torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
