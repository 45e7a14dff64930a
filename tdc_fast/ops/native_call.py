"""A call of a native kernel for host memory, which can be recorded and repeated with other tensors (replay.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels import recording
from tdc_fast.ops.native import address

_NUMBERS = {"offsets", "weight_index", "in_widths", "out_widths", "widths"}  # tensors whose numbers index others
_threads = torch.get_num_threads


class NativeCall:
    """One call of a function that takes addresses, 0 for a tensor that is absent, and then a number of threads."""

    def __init__(
        self, function: Callable[..., None], tensors: Mapping[str, Tensor | None], t: Any, check: Callable[[Any], None]
    ) -> None:
        """Describes it.

        Args:
            function: What is called; it raises ValueError for numbers in index tensors that are out of range.
            tensors: What it takes by name, in its order.
            t: The tensors of the operator (kernels/problems.py), of which those in `tensors` have the same names.
            check: Raises a ValueError that says more, given such a tuple with the index tensors alone.
        """
        self._function, self._check = function, check
        self._addresses = {name: address(tensor) for name, tensor in tensors.items()}
        self._none: Any = t._make([None] * len(t))

    def run(self) -> None:
        """Calls it."""
        recording.note(self)
        self._function(*self._addresses.values(), _threads())

    def again(self, place: recording.Place) -> recording.Again | None:
        """What repeats it with other tensors (recording.py); None where a tensor does not begin where its memory does.

        Args:
            place: Where an address lies.
        """
        found = {name: place(start) for name, start in self._addresses.items() if start}
        if any(offset for _, offset in found.values()):
            return None
        places = {name: index for name, (index, _) in found.items()}
        pick = itemgetter(*[places.get(name, -1) for name in self._addresses])
        numbers = {name: index for name, index in places.items() if name in _NUMBERS}
        function, check, none = self._function, self._check, self._none

        def run(tensors: list[Any], addresses: list[int], stream: int) -> None:
            try:
                function(*pick([*addresses, 0]), _threads())
            except ValueError:
                check(none._replace(**{name: tensors[index] for name, index in numbers.items()}))
                raise

        return recording.Again(run)
