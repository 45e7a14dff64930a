"""Counting multiply-accumulates (MACs) with torch's FlopCounterMode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class MacCounter:
    """Context manager that counts the MACs of what runs inside it, forward and backward.

    Attributes:
        macs: the count, after the block; half of FlopCounterMode's FLOPs.
    """

    def __init__(self) -> None:
        self.macs = 0
        self._counter = FlopCounterMode(display=False)

    def __enter__(self) -> MacCounter:
        self._counter.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._counter.__exit__(*exception)
        self.macs = self._counter.get_total_flops() // 2

    def inside(self, module: str) -> int:
        """MACs counted within a module, given the name that FlopCounterMode has for it; 0 if it never ran."""
        return sum(self._counter.get_flop_counts().get(module, {}).values()) // 2


def measure_macs(model: nn.Module, x: Tensor, t: Tensor, **model_kwargs: Any) -> int:
    """MACs of one forward pass of `model(x, t, **model_kwargs)` over the whole batch, without gradients."""
    with torch.no_grad(), MacCounter() as counter:
        model(x, t, **model_kwargs)
    return counter.macs
