"""Launching a Triton kernel with little host time.

Triton's own launch looks at every argument to find the compiled kernel: several times what the launch itself takes, and
small layers wait for it. What it looks at is fixed here by a problem, but for which arguments are there and whether
their memory is aligned. So the first launch of a problem goes through Triton, and later ones call what that compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_LIMIT = 4096  # launches remembered
_compiled: dict[Hashable, tuple[Any, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, its grid, its arguments by name (those in memory, None where absent, and the others), and options.

    `key` stands for the device, the dtypes and shapes of `tensors`, `constants` and `options`: launches of a kernel
    that differ in any of them differ in it.
    """

    kernel: Any
    grid: tuple[int, ...]
    tensors: Mapping[str, Tensor | TensorDescriptor | None]
    constants: dict[str, Any]
    options: dict[str, int]
    key: Hashable

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.tensors, **self.constants}

    def run(self) -> None:
        """Starts the kernel on the current stream of the current device; an empty grid starts nothing."""
        if not self.grid[0]:
            return
        seen = (self.kernel, self.key, tuple([_alignment(tensor) for tensor in self.tensors.values()]))
        found = _compiled.get(seen)
        if found is not None:
            compiled, in_order = found
            compiled[(*self.grid, 1, 1)](*in_order(self.arguments))
            return
        compiled = self.kernel[self.grid](**self.arguments, **self.options)
        if compiled is None:  # the interpreter compiles nothing
            return
        if len(_compiled) >= _LIMIT:
            _compiled.clear()
        _compiled[seen] = compiled, itemgetter(*self.kernel.arg_names)


def _alignment(tensor: Tensor | TensorDescriptor | None) -> bool | None:
    """Whether the compiler may count on 16 bytes; None where nothing is. Descriptors are always aligned."""
    if tensor is None:
        return None
    return not isinstance(tensor, Tensor) or tensor.data_ptr() % 16 == 0
