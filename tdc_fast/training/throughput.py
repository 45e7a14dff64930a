"""How fast a stage runs on a GPU: samples per second, and the share of its matrix rate that the model's FLOPs take."""

from __future__ import annotations

import functools
import time

import torch

from tdc_fast.distributed import world

REPETITIONS = 20


class Throughput:
    """Rates since the last row of the log, as wall-clock columns.

    Args:
        matrix_rate: FLOP/s of all devices that the samples are spread over.
    """

    def __init__(self, matrix_rate: float) -> None:
        self._matrix_rate = matrix_rate
        self._last: tuple[float, int, int] | None = None

    def start(self, samples: int, macs: int) -> None:
        """Begin to measure.

        Args:
            samples: samples that the stage has trained on.
            macs: MACs that it has spent on them, forward and backward.
        """
        self._last = time.perf_counter(), samples, macs

    def columns(self, samples: int, macs: int) -> dict[str, float]:
        """Samples per second, and model FLOPs utilization (MFU) as a share, since the last call; arguments as before.

        The device must have finished the work on these samples.
        """
        now = time.perf_counter()
        assert self._last is not None
        before, samples_before, macs_before = self._last
        self._last = now, samples, macs
        seconds = max(now - before, 1e-9)
        return {
            "wall_samples_per_second": round((samples - samples_before) / seconds, 3),
            "wall_mfu": round(2 * (macs - macs_before) / seconds / self._matrix_rate, 6),
        }


def throughput_on(device: torch.device, dtype: torch.dtype) -> Throughput | None:
    """What measures a stage on a device; None on the CPU, where progress does not show it.

    Args:
        device: where the stage runs. Every process of the run has a device of this kind.
        dtype: that of its matrix products.
    """
    return Throughput(world().size * matrix_rate(device, dtype)) if device.type == "cuda" else None


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """The measured FLOP/s of products of square matrices, once per process; no generator of torch is drawn from.

    Args:
        device: where to measure.
        dtype: of the matrices.
        size: rows and columns.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for repetitions in (3, REPETITIONS):  # the first products warm up
        _wait_for(device)
        began = time.perf_counter()
        for _ in range(repetitions):
            torch.mm(a, b, out=out)
        _wait_for(device)
        seconds = time.perf_counter() - began
    return 2 * size**3 * REPETITIONS / seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
