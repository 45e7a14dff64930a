"""Batches on their way from host memory to a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from tdc_fast.graphs import outside_captures

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


@dataclass(frozen=True)
class Arriving:
    """A batch that may still be on its way.

    Attributes:
        batch: tensors in any nesting of tuples, lists and dicts.
        event: recorded after the copies; None if nothing is copied.
    """

    batch: Any
    event: Any = None

    def wait(self) -> Any:
        """The batch, for use on the current stream, which waits for the copies; the caller does not."""
        if self.event is not None:
            tensors = [leaf for leaf in _pytree.tree_leaves(self.batch) if isinstance(leaf, Tensor)]
            current = torch.cuda.current_stream(tensors[0].device)
            current.wait_event(self.event)
            for tensor in tensors:
                tensor.record_stream(current)
        return self.batch


class Transfer:
    """Copies batches to a device from any thread, beside the work that the device does.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def start(self, batch: Any) -> Arriving:
        """Begin to copy a batch."""
        if self._device.type != "cuda":
            return Arriving(to_device(batch, self._device))
        with outside_captures():
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(self._stream):
                copied = to_device(batch, self._device)
                event = torch.cuda.Event()
                event.record(self._stream)
        return Arriving(copied, event)
