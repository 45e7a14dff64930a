"""Launching a Triton kernel with little host time.

Triton inspects every argument to find the compiled kernel, which takes several times as long as the launch itself and
delays small layers. Here the problem fixes everything that Triton inspects, except which tensors are given and whether
their memory is aligned. So the first launch of a problem goes through Triton, and later ones call the kernel that it
compiled. A call whose launches were recorded leaves out even the making of a Launch (`Launch.again`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels import recording
from tdc_fast.kernels.triton_launcher import described_like, direct

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
        recording.note(self)
        seen = self._seen()
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

    def _seen(self) -> Hashable:
        """What Triton compiles a kernel for."""
        # None for no tensor, else whether its memory is aligned to 16 bytes; descriptors always are.
        alignment = [
            None if x is None else not isinstance(x, Tensor) or x.data_ptr() % 16 == 0 for x in self.tensors.values()
        ]
        return self.kernel, self.key, *alignment

    def again(self, place: recording.Place) -> recording.Again | None:
        """What repeats this launch with other tensors (recording.py); None if Triton compiled nothing.

        It passes Triton's C function the addresses themselves and tensor maps that are kept (triton_launcher.py). Where
        that is not possible, it passes Triton's launcher descriptors whose checks this launch has passed.
        """
        found = _compiled.get(self._seen())
        if found is None:
            return None
        kernel, in_order = found
        given = in_order(self.arguments)
        arguments = list(given)
        pointers: list[tuple[int, int, int]] = []  # (position, tensor, bytes past its first)
        boxes: list[tuple[int, int]] = []  # (position, tensor) of each descriptor
        for position, argument in enumerate(given):
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                if address:
                    pointers.append((position, *place(address)))
                arguments[position] = 0
            elif isinstance(argument, TensorDescriptor):
                source, past = place(argument.base.data_ptr())
                if past:
                    return None
                boxes.append((position, source))
                arguments[position] = None
        x, y, z = (*self.grid, 1, 1)[:3]
        grid = (x, y, z)
        run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
        describe = {position: described_like(given[position]) for position, _ in boxes}

        def launch(tensors: list[Any], addresses: list[int], stream: int) -> None:
            passed = arguments.copy()
            for position, source, past in pointers:
                passed[position] = addresses[source] + past
            for position, source in boxes:
                passed[position] = describe[position](tensors[source])
            if _hooked():
                kernel[grid](*passed, stream=stream)
            else:
                run(*grid, stream, function, metadata, None, None, None, *passed)

        short = direct(kernel, grid, given, pointers, boxes)
        if short is None:
            return recording.Again(launch)
        run_directly = short.runner()

        def launch_directly(tensors: list[Any], addresses: list[int], stream: int) -> None:
            (launch if _hooked() else run_directly)(tensors, addresses, stream)

        return recording.Again(launch_directly, short)


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
