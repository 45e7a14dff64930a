"""improved-diffusion's way to train one dense model, the baseline of whole runs: eager, under autocast, no graphs.

Where its code loops over parameters in Python or reads a number back per parameter (gradient norm, moving average),
torch's functions for lists of tensors are used, so the baseline is not slower than it has to be.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tdc_fast.diffusion import Diffusion

RATE = 0.9999
WARM_UP = 5


class Recipe:
    """One model, its optimizer and its average.

    Args:
        model: dense, on its device.
        diffusion: the process.
        autocast: run the model in bf16.
        for_graph: the optimizer can be captured, and is torch's fused one.
    """

    def __init__(self, model: nn.Module, diffusion: Diffusion, *, autocast: bool, for_graph: bool = False) -> None:
        self._model, self._diffusion = model, diffusion
        self._parameters: list[Tensor] = list(model.parameters())
        self._device = self._parameters[0].device
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=1e-4, weight_decay=0.0, fused=for_graph or None, capturable=for_graph
        )
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._autocast = autocast

    def step(self, x: Tensor) -> Tensor:
        """Train on a batch.

        Args:
            x: images (B, C, H, W) on the device.

        Returns:
            The norm of the gradient, 0-dim.
        """
        t = torch.randint(self._diffusion.num_timesteps, (len(x),), device=self._device)
        self._optimizer.zero_grad()
        losses = self._diffusion.training_losses(self._denoise, x, t, torch.randn_like(x), {})
        losses["loss"].mean().backward()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1 - RATE)
        return norm

    def _denoise(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            prediction: Tensor = self._model(x, t, **condition)
        return prediction.float()

    def steps_per_second(self, images: Path, batch: int, seconds: float, workers: int) -> float:
        """Train for a while on batches of a loader, and return the speed without the first steps.

        Args:
            images: .npz of `arr_0` (M, H, W, C) uint8.
            batch: images per step.
            seconds: how long.
            workers: processes that load.
        """
        pixels = torch.from_numpy(np.load(images)["arr_0"]).permute(0, 3, 1, 2)
        pinned = self._device.type == "cuda"
        loader = DataLoader(
            TensorDataset(pixels), batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pinned
        )
        began, step = time.perf_counter(), 0
        end = began + seconds
        while True:
            for (part,) in loader:
                if step == WARM_UP:
                    began = _now(self._device)
                if step > WARM_UP and time.perf_counter() >= end:
                    return (step - WARM_UP) / (_now(self._device) - began)
                x = part.to(self._device, non_blocking=True).float() / 127.5 - 1
                self.step(x.contiguous(memory_format=torch.channels_last))
                step += 1


def _now(device: torch.device) -> float:
    """The time when the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
