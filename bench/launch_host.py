"""`python -m bench.launch_host`: host time of the Triton backend per operator, on a machine with or without a GPU.

Kernels are compiled for sm_90; a stand-in for Triton's driver receives the launches and starts nothing. What remains is
the time that Python takes before a kernel starts, without the driver's own microseconds; the GPU waits for it when a
layer computes faster. The second column is the same launch when every launch goes through Triton.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

BATCH, GROUPS, CHANNELS, SIZE = 64, 8, 128, 16
ROUNDS, CALLS = 20, 100


class StandInDriver:
    """What Triton calls of a GPU's driver, with the properties of an H200.

    Attributes:
        launched: grid and arguments of each launch.
    """

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher that notes its launches."""

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # rest: stream, function, packed metadata, launch metadata, two hooks, then the kernel's arguments
            self.launched.append(((x, y, z), rest[6:]))

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """What loading a kernel returns."""
        return name, name, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Shared memory (bytes) and multiprocessors of an H200."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def get_current_device(self) -> int:
        """Device 0."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Stream 0."""
        return 0

    def get_current_target(self) -> Any:
        """The target sm_90."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def stand_in_gpu() -> Iterator[StandInDriver]:
    """Launches of tensors in host memory go to a StandInDriver; tiles are those of an H200."""
    from triton.runtime import driver

    from tdc_fast.kernels import conv_wgrad, launch, tile_shapes

    stand_in, device = StandInDriver(), tile_shapes.Device(90, 132, 232448)
    active = driver._active  # the property driver.active needs a GPU
    launch._compiled.clear()
    driver.set_active(stand_in)
    try:
        with (
            patch.object(tile_shapes, "device_of", lambda _: device),
            patch.object(conv_wgrad, "device_of", lambda _: device),
        ):
            yield stand_in
    finally:
        driver._active = active
        launch._compiled.clear()


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of the Triton backend: the operators of one layer of a residual block."""
    from tdc_fast import RoutingPlan
    from tdc_fast.kernels.problems import ConvTensors, NormTensors
    from tdc_fast.kernels.tile_table import tiles_of
    from tdc_fast.ops import triton as backend
    from tdc_fast.ops.checks import conv_problem, norm_problem

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    plan = RoutingPlan.from_groups(torch.arange(BATCH) * GROUPS // BATCH, GROUPS)
    tiles = tiles_of(plan.tiles, plan.offsets, BATCH)
    x = made(BATCH, CHANNELS, SIZE, SIZE).to(memory_format=torch.channels_last)
    weight = made(GROUPS, CHANNELS, 3, 3, CHANNELS).permute(0, 1, 4, 2, 3)
    bias, scale, shift = made(GROUPS, CHANNELS), made(BATCH, CHANNELS), made(BATCH, CHANNELS)
    t = ConvTensors(x, weight, plan.offsets, plan.tiles, plan.weight_index, bias=bias, residual=x)

    def conv(op: str) -> Any:
        return conv_problem(op, t, (1, 1), (1, 1))

    forward, dgrad, wgrad = (conv(f"routed_conv2d{suffix}") for suffix in ("", "_dgrad", "_wgrad"))
    half = torch.full((GROUPS,), CHANNELS // 2, dtype=torch.int32)
    t = t._replace(tiles=tiles)
    pruned = t._replace(in_widths=half, out_widths=half)
    n = NormTensors(x, bias, bias, plan.offsets, plan.weight_index, scale=scale, shift=shift)
    norm = norm_problem("routed_group_norm", n, 32, 1e-5, True)
    _, mean, rstd = backend.group_norm(norm, n)
    return {
        "conv forward": lambda: backend.conv2d(forward, t),
        "conv forward, widths": lambda: backend.conv2d(forward, pruned),
        "conv dgrad": lambda: backend.conv2d_dgrad(dgrad, x, t),
        "conv wgrad + bias": lambda: backend.conv2d_wgrad(wgrad, x, t, (True, True, False)),
        "conv wgrad, widths": lambda: backend.conv2d_wgrad(wgrad, x, pruned, (True, False, False)),
        "norm forward": lambda: backend.group_norm(norm, n),
        "norm backward": lambda: backend.group_norm_backward(norm, x, mean, rstd, n, (True,) * 5 + (False,)),
    }


def through_triton(call: Callable[[], Any]) -> Callable[[], None]:
    """The same call, forgetting compiled kernels between launches."""
    from tdc_fast.kernels import launch

    def forgetful() -> None:
        launch._compiled.clear()
        call()

    return forgetful


def main() -> int:
    """Print the table and return the exit code: 0, or 2 without Triton."""
    try:
        import triton  # noqa: F401
    except ImportError:
        print("This bench needs Triton: pip install 'tdc_fast[gpu]'", file=sys.stderr)
        return 2
    with stand_in_gpu() as driver:
        print(f"{'host microseconds per call':<28}{'here':>8}{'through Triton alone':>24}")
        for name, call in calls().items():
            peers = {"here": call, "triton": through_triton(call)}
            medians: dict[str, list[float]] = {peer: [] for peer in peers}
            for _ in range(ROUNDS):
                for peer, run in peers.items():
                    run()
                    began = time.perf_counter()
                    for _ in range(CALLS):
                        run()
                    medians[peer].append((time.perf_counter() - began) / CALLS * 1e6)
                    driver.launched.clear()
            here, alone = (statistics.median(values) for values in medians.values())
            print(f"{name:<28}{here:8.1f}{alone:24.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
