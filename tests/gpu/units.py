"""The test kernels of Hopper's units (csrc/emulator/self_test_sm90_kernels.cuh) on a GPU, compiled by NVRTC."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from tdc_fast.ops import cuda_families, cuda_nvrtc, native
from tests.emulator.harness import CSRC
from tests.gpu import hangs, restarting

UNIT = "self_test_sm90"


def sources() -> dict[str, str]:
    """{include name: text} of the kernels, which come first, and of what they include."""
    found = {f"{UNIT}.cu": (CSRC / "emulator" / f"{UNIT}_kernels.cuh").read_text(encoding="utf-8")}
    included = cuda_families.read_sources("conv_hopper_forward")
    return found | {name: included[name] for name in ("cuda/device.cuh", "cuda/device_sm90.cuh", "cuda/tensor_map.h")}


def compiled(*options: str) -> tuple[bytes, str]:
    """The cubin and the compiler's log; of kernels that report hangs where a test runs alone."""
    own = sources()
    return hangs.compiled(hangs.with_other_waits(own) if restarting.ALONE in os.environ else own, *options)


class Launcher(cuda_nvrtc.Nvrtc):
    """Knows these kernels instead of the families."""

    def __init__(self) -> None:
        super().__init__()
        self._cubin, _ = compiled()

    def _module(self, index: int, device: torch.device, launch: Any, driver: Any) -> Any:
        if index not in self._modules:
            self._modules[index] = driver.moduleLoadData(self._cubin)
        return self._modules[index]


class OnGpu:
    """A GPU of compute capability 9.0, as a machine of tests/emulator/sm90.py."""

    device = "cuda"

    def __init__(self) -> None:
        self._launcher = Launcher()

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        params: bytes,
        places: Sequence[int] = (),
    ) -> None:
        """Runs `self_test_<kernel>` to its end."""
        launch = native.module.Launch(
            kernel=f"self_test_{kernel}", grid=grid, threads=threads, shared_bytes=shared, params=params,
            shapes="a test of Hopper's units", tensor_maps=list(places),
        )  # fmt: skip
        self._launcher.run([launch], torch.device("cuda"))
        torch.cuda.synchronize()
