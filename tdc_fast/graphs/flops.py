"""FLOPs of replays: torch's FlopCounterMode sees no operators in one, so it is told what the operators took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Counts = dict[str, dict[Any, int]]
"""FLOPs by module and operator."""


def active_counters() -> list[FlopCounterMode] | None:
    """The FLOP counters that are at work; None if there is another dispatch mode, which wants to see all operators."""
    if not torch._C._len_torch_dispatch_stack():
        return []
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and only needed where there is a mode

    found = []
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if not isinstance(counter, FlopCounterMode):
            return None
        found.append(counter)
    return found


def difference(after: Counts, before: Counts) -> Counts:
    """What was counted between two results of `FlopCounterMode.get_flop_counts`."""
    return {
        module: {kind: count - before.get(module, {}).get(kind, 0) for kind, count in kinds.items()}
        for module, kinds in after.items()
    }


def add_flops(counter: FlopCounterMode, counts: Counts) -> None:
    """Add to what a counter has counted."""
    for module, kinds in counts.items():
        for kind, count in kinds.items():
            counter.flop_counts[module][kind] += count
