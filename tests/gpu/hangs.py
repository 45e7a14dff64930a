"""Kernels that say at which barrier they hang: the shipped sources with other waits (hangs.cuh), compiled by NVRTC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tdc_fast.ops import cuda_nvrtc, native
from tdc_fast.ops.cuda_families import read_sources
from tests.chosen_kernels import unit_of

WAITS = Path(__file__).with_suffix(".cuh")
HEADER = "cuda/device_sm90.cuh"


def with_other_waits(sources: dict[str, str]) -> dict[str, str]:
    """Sources whose waits for barriers report themselves."""
    if HEADER not in sources:
        return sources
    return sources | {HEADER: sources[HEADER] + WAITS.read_text(encoding="utf-8")}


def sources_of(kernel: str) -> dict[str, str]:
    """The sources of one kernel alone."""
    family = next(family for family, kernels in native.module.cuda_kernels.items() if kernel in kernels)
    sources = with_other_waits(read_sources(family))
    return sources | {next(iter(sources)): unit_of(family, [kernel])}


def compiled(sources: dict[str, str], *options: str) -> tuple[bytes, str]:
    """The cubin for compute capability 9.0 and the compiler's log."""
    with patch.object(cuda_nvrtc, "read_sources", lambda family: sources):
        return cuda_nvrtc.compile_family("reporting", cuda_nvrtc.target(90), options)


class Reporting(cuda_nvrtc.Nvrtc):
    """Runs such kernels, each of which is compiled at its first use, and names each before it runs."""

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        for launch in launches:
            print(f"launches {cuda_nvrtc.describe(launch)}", flush=True)
            super().run([launch], device)
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()

    def _module(self, index: int, device: torch.device, launch: Any, driver: Any) -> Any:
        key = (index, launch.kernel)
        if key not in self._modules:
            self._modules[key] = driver.moduleLoadData(compiled(sources_of(launch.kernel))[0])
        return self._modules[key]
