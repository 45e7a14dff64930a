"""The precision that a flag names, for what runs a trained model without training it."""

from __future__ import annotations

from typing import Literal

import torch

from tdc_fast.errors import invalid

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def named_dtype(name: DtypeName, device: torch.device, trained_in_bf16: bool, argument: str = "dtype") -> torch.dtype:
    """The dtype that a flag names.

    Args:
        name: auto is that of training on a GPU that has it, and float32 on the CPU.
        device: where the model runs.
        trained_in_bf16: whether it was trained in bf16.
        argument: the flag, for errors.

    Raises:
        ValueError: the name is unknown, or the device does not compute in that dtype.
    """
    if name == "auto":
        return torch.bfloat16 if trained_in_bf16 and device.type == "cuda" and _has_bf16(device) else torch.float32
    if name == "float16" and device.type == "cpu":
        raise invalid(argument, name, "float32 or bfloat16 on the CPU, whose kernels have no float16; or --device cuda")
    if name == "bfloat16" and device.type == "cuda" and not _has_bf16(device):
        gpu = torch.cuda.get_device_name(device)
        raise invalid(argument, name, f"float32 or float16, as {gpu} has no bfloat16")
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if found is None:
        raise invalid(argument, name, "auto, float32, bfloat16 or float16")
    return found


def dtype_word(dtype: torch.dtype) -> str:
    """The name of a dtype as flags and files have it."""
    return str(dtype).removeprefix("torch.")


def _has_bf16(device: torch.device) -> bool:
    """Whether a GPU has matrix units for bfloat16: from compute capability 8.0."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
