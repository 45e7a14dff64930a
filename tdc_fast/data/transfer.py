"""Batches on their way from host memory to a device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")


def to_device(batch: T, device: torch.device) -> T:
    """A batch with all its tensors on a device. On a GPU nothing waits: they are copied from pinned memory.

    Args:
        batch: tensors in any nesting of tuples, lists and dicts.
        device: where to.
    """

    def moved(value: object) -> object:
        if not isinstance(value, Tensor) or value.device == device:
            return value
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # torch keeps this memory until the copy is done
        return value.to(device, non_blocking=True)

    found: T = _pytree.tree_map(moved, batch)
    return found
