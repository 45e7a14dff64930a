"""What a time depends on besides the layer: the device, the dtype, the batch and the number of groups."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from tdc_fast.errors import integer, invalid
from tdc_fast.nn.inference import DTYPES
from tdc_fast.ops import native


@dataclass(frozen=True)
class Setting:
    """Where and how layers run.

    Attributes:
        device: name of the device, as `device_name` gives it.
        dtype: "float32", "bfloat16" or "float16".
        batch: samples of a forward, over all groups.
        num_groups: N.

    Raises:
        ValueError: naming the field.
    """

    device: str
    dtype: str
    batch: int
    num_groups: int

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device:
            raise invalid("device", self.device, "the name of a device")
        if self.dtype not in [str(dtype).removeprefix("torch.") for dtype in DTYPES]:
            raise invalid("dtype", self.dtype, "float32, bfloat16 or float16")
        for name in ("batch", "num_groups"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, batch: int, num_groups: int, threads: int = 0) -> Setting:
        """The setting on a device of this machine; on the CPU with so many threads, 0 for as many as torch has now."""
        return cls(device_name(device, threads), str(dtype).removeprefix("torch."), batch, num_groups)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def device_name(device: torch.device, threads: int = 0) -> str:
    """The name of a GPU as its driver has it, or of the processor with a number of threads, 0 for that of torch."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = threads or torch.get_num_threads()
    return f"{processor_name()}, {count} thread{'s' if count > 1 else ''}"


def processor_name() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def instruction_set(device: torch.device) -> str:
    """The instruction set of the kernels on a device, such as "avx2"; "" on a GPU and without the native module."""
    return str(native.module.cpu_isa()) if device.type == "cpu" and native.module is not None else ""
