"""Launching a Triton kernel with little host time.

Triton inspects every argument to find the compiled kernel, which takes several times as long as the launch itself and
delays small layers. Here the problem fixes everything that Triton inspects, except which tensors are given and whether
their memory is aligned. So the first launch of a problem goes through Triton, and later ones call the kernel that it
compiled.
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


@dataclass(slots=True)  # not frozen: that takes four times as long to make
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: The jit function.
        grid: Programs along each axis.
        tensors: The arguments in memory by name, None where absent.
        constants: The other arguments by name.
        options: Triton's compile options (num_warps, num_stages, maxnreg).
        key: Differs between launches of a kernel that differ in device, in dtypes or shapes of `tensors`, in
            `constants` or in `options`.
    """

    kernel: Any
    grid: tuple[int, ...]
    tensors: Mapping[str, Tensor | TensorDescriptor | None]
    constants: dict[str, Any]
    options: dict[str, int]
    key: Hashable

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        return {**self.tensors, **self.constants}

    def run(self) -> None:
        """Starts the kernel on the current stream of the current device, unless the grid is empty."""
        if not self.grid[0]:
            return
        # None for no tensor, else whether its memory is aligned to 16 bytes; descriptors always are.
        alignment = [
            None if x is None else not isinstance(x, Tensor) or x.data_ptr() % 16 == 0 for x in self.tensors.values()
        ]
        seen = (self.kernel, self.key, *alignment)
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
