"""Drawing samples: a sampler's steps from noise to images, captured on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.diffusion import Diffusion
from tdc_fast.diffusion.gaussian import draw_noise
from tdc_fast.diffusion.guidance import GuidedDenoiser
from tdc_fast.diffusion.protocols import Denoiser, prediction_of
from tdc_fast.diffusion.samplers import SamplerName, SpacingName
from tdc_fast.diffusion.trajectory import Trajectory
from tdc_fast.diffusion.updates import advance
from tdc_fast.errors import invalid
from tdc_fast.graphs import graphed
from tdc_fast.routing import TimestepGroups


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
        eta: noise of DDIM, 0 for none; the other samplers take only 0.
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
        self._trajectory = Trajectory.plan(diffusion, sampler, steps, spacing, eta)
        diffusion.check_groups(model)
        _warn_of_idle_experts(model, self._trajectory)
        self._diffusion, self._model, self._sampler, self._clip_denoised = diffusion, model, sampler, clip_denoised
        self._steps: dict[torch.device, Callable[..., tuple[Tensor, Tensor]]] = {}

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
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise invalid("noise", f"shape {tuple(noise.shape)}", f"x_T of the shape of the samples, {tuple(shape)}")
        x = torch.empty(tuple(shape), device=device, memory_format=_memory_format(len(shape)))
        x = draw_noise(x, generator) if noise is None else noise.to(x)
        step, trajectory = self._step_on(x.device), self._trajectory
        timesteps, weights = trajectory.timesteps.to(x.device), trajectory.weights.to(x.device)
        x0 = torch.zeros_like(x) if trajectory.remembers else None
        indices: Any = range(len(trajectory))
        if progress:
            from tqdm import tqdm

            indices = tqdm(indices, desc=f"sampling ({self._sampler})", unit="step")
        visited = trajectory.timesteps.tolist()
        for index in indices:
            kwargs = dict(model_kwargs or {})
            if isinstance(self._model, GuidedDenoiser):  # a graph of its own for the steps without guidance
                kwargs["guided"] = self._model.guides(visited[index])
            t = timesteps[index].repeat(x.shape[0])
            drawn = draw_noise(x, generator) if trajectory.draws_noise else None
            own = weights[:, index : index + 1].repeat(1, x.shape[0])
            x, x0_now = step(x, t, own, drawn, x0, kwargs)
            x0 = x0_now if trajectory.remembers else None
            if on_step is not None:
                on_step()
        return x

    def _step_on(self, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
        if device not in self._steps:
            modules = [self._model] if isinstance(self._model, nn.Module) else []
            self._steps[device] = graphed(self._step, device, name=f"a {self._sampler} step", modules=modules)
        return self._steps[device]

    def _step(
        self,
        x: Tensor,
        t: Tensor,
        weights: Tensor,
        noise: Tensor | None,
        last_x0: Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        output = prediction_of(self._model(x, t, **model_kwargs))
        return advance(
            self._diffusion, output, x, weights, noise=noise, last_x0=last_x0, clip_denoised=self._clip_denoised
        )


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
        eta: noise of DDIM, 0 for none; the other samplers take only 0.
        device: where to sample; None for torch's default device.
        noise: x_T (shape), instead of a draw.
        spacing: how the steps are spread over the timesteps (see `sampling_steps`).
        on_step: called after every step.

    Returns:
        float32 samples (B, C, ...), in [-1, 1] when `clip_denoised`.

    Raises:
        ValueError: for an unknown sampler, steps that the process does not have, or noise of another shape.
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


def _warn_of_idle_experts(model: Denoiser, trajectory: Trajectory) -> None:
    """Warn where the steps reach no timestep of some experts of a packed model."""
    groups = getattr(model, "groups", None)
    if not isinstance(groups, TimestepGroups):
        return
    idle = groups.unvisited(trajectory.timesteps.tolist())
    if idle:
        intervals = list(groups)
        names = ", ".join(f"{g} (t {intervals[g][0]} to {intervals[g][1] - 1})" for g in idle)
        warnings.warn(
            f"{len(trajectory)} sampling steps leave {len(idle)} of {groups.num_groups} experts idle: {names}; more "
            "steps, another spacing (trailing, linspace) or fewer groups use them",
            stacklevel=4,
        )


def _memory_format(dimensions: int) -> torch.memory_format:
    return torch.channels_last if dimensions == 4 else torch.contiguous_format
