"""The computation of one step over a batch of places: denoiser, guidance, and every sample's own update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.guidance import guide
from tdc_fast.diffusion.protocols import Denoiser, prediction_of
from tdc_fast.diffusion.updates import StepWeights, advance
from tdc_fast.graphs import captures_on, graphed


class Stepper:
    """Takes a batch one step; on a GPU from one CUDA graph for each size of batch.

    Args:
        model: the denoiser, called as model(x, t) or model(x, t, y=labels).
        diffusion: its process.
        image_shape: (C, H, W).
        device: where the model is.
        sizes: the sizes of batches, increasing; () for all sizes where nothing is captured, else 1, 2, 3, 4, 6, 8, 12,
            and so on: two between a number and its double, so that little of a batch is padding.
        max_batch: the largest size.
        has_classes: the model takes labels.
        clip_denoised: limit every predicted image to [-1, 1].

    Attributes:
        is_static: a step has all tensors that any step may have, so that one graph serves all batches of a size.
        sizes: the sizes that there are; () for all.
        forward_seconds: time in the denoiser; with graphs, in the launch of the whole graph.
    """

    def __init__(
        self,
        model: Denoiser,
        diffusion: Diffusion,
        image_shape: tuple[int, int, int],
        device: torch.device,
        *,
        sizes: Sequence[int],
        max_batch: int,
        has_classes: bool,
        clip_denoised: bool,
    ) -> None:
        self.device, self.is_static = device, captures_on(device)
        if not sizes and self.is_static:
            sizes = sorted({size for power in range(max_batch.bit_length()) for size in (2**power, 3 * 2**power // 2)})
        self.sizes = tuple([*(size for size in sizes if size < max_batch), max_batch]) if sizes else ()
        self.forward_seconds = 0.0
        self._event: torch.cuda.Event | None = None
        self._model, self._diffusion, self._shape = model, diffusion, image_shape
        self._has_classes, self._clip_denoised = has_classes, clip_denoised
        modules = [model] if isinstance(model, nn.Module) else []
        self._run = graphed(
            self._compute, device, name="a serving step", modules=modules, max_graphs=max(1, len(self.sizes))
        )

    def size_for(self, rows: int, places: int) -> int:
        """The smallest size of a batch that holds so many rows and has no more than so many places.

        Where there is none, as after memory ran out, it is the rows: a larger size might not fit either.
        """
        return next((size for size in self.sizes if rows <= size <= places), rows)

    def empty(self, rows: int) -> Tensor:
        """Images float32 (rows, C, H, W) in the layout of batches, not written."""
        return torch.empty(rows, *self._shape, device=self.device, memory_format=torch.channels_last)

    def run(self, **tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """A step; arguments and results as those of `_compute`, on the device."""
        began, before = time.perf_counter(), self.forward_seconds
        result: tuple[Tensor, Tensor] = self._run(tensors)
        if self.forward_seconds == before:  # Python did not run: the step was replayed
            self.forward_seconds += time.perf_counter() - began
        if self.device.type == "cuda":
            self._pace()
        return result

    def _pace(self) -> None:
        """Wait for the step before this one, so that the host is one step ahead of the GPU."""
        event, before = torch.cuda.Event(), self._event
        event.record(torch.cuda.current_stream(self.device))
        self._event = event
        if before is not None:
            before.synchronize()

    def warm_up(self) -> None:
        """Capture every size before the first request comes."""
        for size in self.sizes if self.is_static else ():
            x = self.empty(size).zero_()
            whole = torch.zeros(size, dtype=torch.int64, device=self.device)
            weights = torch.zeros(len(StepWeights._fields), size, device=self.device)
            labels = whole if self._has_classes else None
            for _ in range(3):  # as it is, as it is, captured
                self.run(
                    x=x, t=whole, weights=weights, noise=x, last_x0=x, labels=labels, source=whole,
                    partner=whole if self._has_classes else None, guidance=weights[0] if self._has_classes else None,
                )  # fmt: skip

    def _compute(self, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Take every row one step.

        Args:
            tensors: x (R, C, H, W); t int64 (R,) original timesteps; weights float32 (8, R) as `advance` takes them;
                noise and last_x0 like x, or None where no row needs them; labels int64 (R,) or None; source int64 (R,),
                the row whose image each row reads, or None for its own; partner int64 (R,), the row with the prediction
                for no class, its own where it is not guided, with guidance float32 (R,), its scale less 1; or None.

        Returns:
            The images after the step and the predicted clean ones, each like x.
        """
        x, source = tensors["x"], tensors["source"]
        if source is not None:
            x = torch.index_select(x, 0, source, out=torch.empty_like(x))
        conditions = {} if tensors["labels"] is None else {"y": tensors["labels"]}
        began = time.perf_counter()
        output = prediction_of(self._model(x, tensors["t"], **conditions))
        self.forward_seconds += time.perf_counter() - began
        if tensors["partner"] is not None:
            unconditional = output.index_select(0, tensors["partner"])
            output = guide(output, unconditional, tensors["guidance"], x.shape[1])
        return advance(
            self._diffusion, output, x, tensors["weights"], noise=tensors["noise"], last_x0=tensors["last_x0"],
            clip_denoised=self._clip_denoised,
        )  # fmt: skip
