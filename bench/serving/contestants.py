"""What serves: the engine, and what it is measured against, all with the same interface and random weights.

Weights do not change the speed, and the images are not looked at.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, pack_experts
from tdc_fast.diffusion import Diffusion, SamplingLoop
from tdc_fast.experiments.contestants import SETTINGS
from tdc_fast.models.iddpm import UNet
from tdc_fast.runs.build import build_diffusion, build_unet
from tdc_fast.runs.config import TrainConfig
from tdc_fast.serving import Engine, Request, Result

CIFAR10 = {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "noise_schedule": "cosine"}
MODELS: dict[str, tuple[dict[str, Any], int]] = {"digits": (SETTINGS, 1), "cifar10": (CIFAR10, 3)}
"""Options of the network by name, and channels of its images: that of the demo, and the paper's for CIFAR-10."""


class Handle(Protocol):
    """A request that was taken."""

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the images."""


class Contestant(Protocol):
    """Takes requests from any thread."""

    def submit(self, request: Request) -> Handle:
        """Take a request."""

    def start(self) -> None:
        """Begin to serve."""

    def close(self, *, drain: bool = True) -> None:
        """Stop."""


class Problem:
    """A network, its experts and its process.

    Args:
        model: "digits" or "cifar10".
        num_experts: N.
        device: where everything is.
        dtype: of the weights.

    Attributes:
        image_shape: (C, H, W).
        diffusion: the process.
        groups: N groups of equal width.
    """

    def __init__(self, model: str, num_experts: int, device: torch.device, dtype: torch.dtype) -> None:
        options, channels = MODELS[model]
        config = TrainConfig(**options)
        torch.manual_seed(0)
        self._experts: list[UNet] = [build_unet(config, channels).eval() for _ in range(num_experts)]
        self._device, self._dtype = device, dtype
        self.image_shape = (channels, config.image_size, config.image_size)
        self.diffusion: Diffusion = build_diffusion(config)
        self.groups = TimestepGroups.uniform(config.diffusion_steps, num_experts)

    def contestants(self, max_batch: int) -> dict[str, Callable[[], Contestant]]:
        """What is compared, by name; each call of a value makes a new one. Engines are as they are without options.

        engine: step-level batches, one routed forward. request level: the same routed model, whole requests of the
        same steps in a batch until all are done. expert by expert: step-level batches, one forward per expert with
        images in the step. dense: step-level batches, one dense model.
        """
        routed = self._placed(pack_experts(self._experts, self.groups))
        loop = self._placed(LoopOverExperts(self._experts, self.groups))
        dense = self._placed(self._experts[0])

        def engine(model: nn.Module) -> Contestant:
            return Engine(
                model, self.diffusion, self.image_shape, max_batch=max_batch, max_queue=10**6, deterministic=False
            )

        return {
            "engine": lambda: engine(routed),
            "request level": lambda: RequestLevel(routed, self.diffusion, self.image_shape, max_batch),
            "expert by expert": lambda: engine(loop),
            "dense": lambda: engine(dense),
        }

    def _placed(self, model: nn.Module) -> nn.Module:
        placed: nn.Module = model.to(self._device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed.eval()


class LoopOverExperts(nn.Module):
    """The denoiser without routing: each expert in turn computes its own samples of the batch.

    Args:
        experts: one dense model per group.
        groups: which expert serves which timestep.
    """

    def __init__(self, experts: list[UNet], groups: TimestepGroups) -> None:
        super().__init__()
        self._experts, self._groups = nn.ModuleList(experts), groups

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction, like x, for timesteps t (B,)."""
        ids = self._groups.group_of(t)
        out = torch.empty_like(x)
        for expert in ids.unique().tolist():
            index = (ids == expert).nonzero().squeeze(1)
            part = x[index].contiguous(memory_format=torch.channels_last)
            out[index] = self._experts[expert](part, t[index]).to(out.dtype)
        return out


def whole_requests(waiting: Sequence[Request], max_batch: int) -> list[int]:
    """The next batch of whole requests: positions of the oldest, and of as many of the same number of steps as fit."""
    chosen: list[int] = []
    images = 0
    for index, request in enumerate(waiting):
        if request.steps == waiting[0].steps and images + request.num_images <= max_batch:
            chosen.append(index)
            images += request.num_images
    return chosen


class RequestLevel:
    """Batches of whole requests: the oldest one, and as many of the same number of steps as wait and fit.

    Args:
        model: the denoiser.
        diffusion: its process.
        image_shape: (C, H, W).
        max_batch: images in a batch.
    """

    def __init__(
        self, model: nn.Module, diffusion: Diffusion, image_shape: tuple[int, int, int], max_batch: int
    ) -> None:
        self._model, self._diffusion, self._shape, self._max_batch = model, diffusion, image_shape, max_batch
        self._device = next(model.parameters()).device
        self._loops: dict[int, SamplingLoop] = {}
        self._changed = threading.Condition()
        self._waiting: list[tuple[Request, float, Future[Result]]] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, request: Request) -> Future[Result]:
        """Take a request."""
        future: Future[Result] = Future()
        with self._changed:
            self._waiting.append((request, time.monotonic(), future))
            self._changed.notify()
        return future

    def close(self, *, drain: bool = True) -> None:
        """Stop; without `drain`, what waits is dropped."""
        with self._changed:
            self._is_closing = True
            if not drain:
                for _, _, future in self._waiting:
                    future.cancel()
                self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                chosen = set(whole_requests([request for request, _, _ in self._waiting], self._max_batch))
                batch = [entry for index, entry in enumerate(self._waiting) if index in chosen]
                self._waiting = [entry for index, entry in enumerate(self._waiting) if index not in chosen]
            self._draw(batch)

    def _draw(self, batch: list[tuple[Request, float, Future[Result]]]) -> None:
        began = time.monotonic()
        steps = batch[0][0].steps
        if steps not in self._loops:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that few steps leave experts idle
                self._loops[steps] = SamplingLoop(self._diffusion, self._model, steps=steps)
        noise = torch.cat(
            [
                torch.randn(request.num_images, *self._shape, generator=torch.Generator().manual_seed(request.seed))
                for request, _, _ in batch
            ]
        )
        samples = self._loops[steps].draw(tuple(noise.shape), noise=noise, device=self._device).cpu()
        now, first = time.monotonic(), 0
        for request, submitted, future in batch:
            images = samples[first : first + request.num_images]
            first += request.num_images
            future.set_result(Result(images, None, began - submitted, now - submitted))
