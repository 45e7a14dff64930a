"""Drawing samples: a sampler's steps from noise to images, captured on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.gaussian import draw_noise
from tdc_fast.diffusion.protocols import Denoiser
from tdc_fast.diffusion.samplers import (
    Dpm2mHistory,
    SamplerName,
    SpacingName,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    sampling_steps,
)
from tdc_fast.errors import invalid
from tdc_fast.graphs import graphed
from tdc_fast.routing import TimestepGroups

History = tuple[Tensor, Tensor]
"""What DPM-Solver++(2M) remembers: its last predicted x0 and the steps (B,) of it."""


class SamplingLoop:
    """Draws samples with one sampler, batch after batch.

    On a GPU a step, the denoiser and the sampler's update, is captured once per shape and then replayed
    (`tdc_fast.graphs`), also in later batches.

    Warns if the model is packed from experts and the steps leave some of them unused.

    Args:
        diffusion: the process.
        model: the denoiser.
        sampler: "ddpm", "ddim" or "dpm++2m".
        steps: how many steps to visit, spread as suits the sampler (see `sampling_steps`); None visits those of
            `diffusion` (respace it for improved-diffusion's spacings).
        spacing: how the steps are spread over the timesteps (see `sampling_steps`).
        eta: noise of DDIM, 0 for none.
        clip_denoised: limit the predicted x0 to [-1, 1].

    Raises:
        ValueError: for an unknown sampler, or steps that the process does not have.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        model: Denoiser,
        *,
        sampler: SamplerName = "ddim",
        steps: int | None = None,
        spacing: SpacingName = "auto",
        eta: float = 0.0,
        clip_denoised: bool = True,
    ) -> None:
        if eta < 0:
            raise invalid("eta", eta, "0 (deterministic) or a number above it")
        visited = sampling_steps(diffusion, sampler, steps, spacing)
        _warn_of_idle_experts(model, diffusion, visited)
        self._process = diffusion if len(visited) == diffusion.num_timesteps else diffusion.with_timesteps(visited)
        self._model, self._sampler, self._eta, self._clip_denoised = model, sampler, eta, clip_denoised
        self._draws_noise = sampler == "ddpm" or (sampler == "ddim" and eta > 0)
        self._steps: dict[torch.device, Callable[..., tuple[Tensor, History | None]]] = {}

    @torch.no_grad()
    def draw(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
        device: torch.device | str | None = None,
        noise: Tensor | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Draw a batch; see `sample`."""
        if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) < 2 or any(s < 0 for s in shape):
            raise invalid("shape", shape, "sizes (B, C, ...)")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise invalid("generator", generator, "a torch.Generator, such as torch.Generator().manual_seed(0)")
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise invalid("device", device, 'a device of torch, such as "cpu" or "cuda:0"') from error
        x = torch.empty(tuple(shape), device=device, memory_format=_memory_format(len(shape)))
        x = draw_noise(x, generator) if noise is None else noise.to(x)
        step = self._step_on(x.device)
        history: History | None = None
        if self._sampler == "dpm++2m":
            empty = Dpm2mHistory.empty(x)
            history = (empty.x0, empty.t)
        indices: Any = range(self._process.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm import tqdm

            indices = tqdm(indices, desc=f"sampling ({self._sampler})", unit="step")
        for index in indices:
            t = torch.full((x.shape[0],), index, device=x.device, dtype=torch.int64)
            drawn = draw_noise(x, generator) if self._draws_noise else None
            x, history = step(x, t, drawn, history, dict(model_kwargs or {}))
            if on_step is not None:
                on_step()
        return x

    def _step_on(self, device: torch.device) -> Callable[..., tuple[Tensor, History | None]]:
        if device not in self._steps:
            modules = [self._model] if isinstance(self._model, nn.Module) else []
            self._steps[device] = graphed(self._step, device, name=f"a {self._sampler} step", modules=modules)
        return self._steps[device]

    def _step(
        self, x: Tensor, t: Tensor, noise: Tensor | None, history: History | None, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, History | None]:
        options: dict[str, Any] = {"clip_denoised": self._clip_denoised, "model_kwargs": model_kwargs}
        if self._sampler == "ddpm":
            return ddpm_step(self._process, self._model, x, t, noise=noise, **options), None
        if self._sampler == "ddim":
            return ddim_step(self._process, self._model, x, t, eta=self._eta, noise=noise, **options), None
        before = None if history is None else Dpm2mHistory(*history)
        x, after = dpmpp_2m_step(self._process, self._model, x, t, history=before, **options)
        return x, (after.x0, after.t)


def sample(
    diffusion: Diffusion,
    model: Denoiser,
    shape: Sequence[int],
    *,
    sampler: SamplerName = "ddim",
    steps: int | None = None,
    generator: torch.Generator | None = None,
    clip_denoised: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = False,
    eta: float = 0.0,
    device: torch.device | str | None = None,
    noise: Tensor | None = None,
    spacing: SpacingName = "auto",
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Draw one batch of samples; `SamplingLoop` draws several.

    Warns if the model is packed from experts and the steps leave some of them unused.

    Args:
        diffusion: the process.
        model: the denoiser.
        shape: (B, C, ...).
        sampler: "ddpm", "ddim" or "dpm++2m".
        steps: how many steps to visit, spread as suits the sampler (see `sampling_steps`); None visits those of
            `diffusion` (respace it for improved-diffusion's spacings).
        generator: makes the result reproducible; it may be on the CPU whatever `device` is.
        clip_denoised: limit the predicted x0 to [-1, 1].
        model_kwargs: further arguments of the model.
        progress: show a progress bar.
        eta: noise of DDIM, 0 for none.
        device: where to sample; None for torch's default device.
        noise: x_T (shape), instead of a draw.
        spacing: how the steps are spread over the timesteps (see `sampling_steps`).
        on_step: called after every step.

    Returns:
        float32 samples (B, C, ...), in [-1, 1] when `clip_denoised`.

    Raises:
        ValueError: for an unknown sampler, or steps that the process does not have.
    """
    loop = SamplingLoop(
        diffusion, model, sampler=sampler, steps=steps, spacing=spacing, eta=eta, clip_denoised=clip_denoised
    )
    return loop.draw(
        shape,
        generator=generator,
        model_kwargs=model_kwargs,
        progress=progress,
        device=device,
        noise=noise,
        on_step=on_step,
    )


def _warn_of_idle_experts(model: Denoiser, diffusion: Diffusion, visited: Sequence[int]) -> None:
    """Warn where the steps reach no timestep of some experts of a packed model."""
    groups = getattr(model, "groups", None)
    if not isinstance(groups, TimestepGroups):
        return
    steps = torch.tensor(visited, dtype=torch.int64)
    idle = groups.unvisited(diffusion.original_timesteps(steps).tolist())
    if idle:
        intervals = list(groups)
        names = ", ".join(f"{g} (t {intervals[g][0]} to {intervals[g][1] - 1})" for g in idle)
        warnings.warn(
            f"{len(visited)} sampling steps leave {len(idle)} of {groups.num_groups} experts idle: {names}; more "
            "steps, another spacing (trailing, linspace) or fewer groups use them",
            stacklevel=4,
        )


def _memory_format(dimensions: int) -> torch.memory_format:
    return torch.channels_last if dimensions == 4 else torch.contiguous_format
