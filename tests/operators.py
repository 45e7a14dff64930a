"""Which of torch's operators a computation calls, as the dispatcher sees them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode, Counter):
    """Counts operators by name, `aten` ones and ours, in the forward and in the backward of the block."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Counter.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self[func._opname] += 1
        return func(*args, **(kwargs or {}))
