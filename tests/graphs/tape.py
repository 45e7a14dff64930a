"""A stand-in for CUDA graphs on the CPU: records the operators that a function calls, and calls them again.

As on a GPU, what is captured is not executed, Python does not run in a replay, every tensor stays where it was in the
capture, and reading a number back is an error. So a test on the CPU sees a learning rate that was baked in, an input
that was not copied, or a value that was read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
ONLY_ON_THE_CPU = {
    "check_timesteps", "UNet._check_inputs", "TimestepGroups.group_of", "_next_steps", "RoutedEmbedding.forward",
}  # fmt: skip
"""Functions that check values in host memory, and leave them alone on a device."""


class Tape(TorchDispatchMode):
    """The operators of one capture, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self.outputs: Any = None
        self.replays = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = operator._schema.name
        if name in READS:
            if not self._in_a_check():
                raise RuntimeError("operation not permitted when stream is capturing")
            return operator(*args, **kwargs)
        written = _written(operator, args, kwargs)
        for tensor in written:
            storage = tensor.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (_whole(tensor), _whole(tensor).clone()))
        result = operator(*args, **kwargs)
        args, kwargs = _pytree.tree_map_only(Tensor, _same_memory, (args, kwargs))
        fresh = (
            []
            if _returns_aliases(operator)
            else [_same_memory(value) for value in _pytree.tree_leaves(result) if isinstance(value, Tensor)]
        )
        if written or fresh:
            self.operators.append((operator, args, kwargs, fresh))
        return result

    def undo(self) -> None:
        """Give all memory that was written the contents that it had before the capture."""
        with _plainly():
            for tensor, before in self._before.values():
                tensor.copy_(before)

    def replay(self) -> None:
        """Call all operators again on the same memory."""
        self.replays += 1
        with _plainly():
            for operator, args, kwargs, fresh in self.operators:
                result = [v for v in _pytree.tree_leaves(operator(*args, **kwargs)) if isinstance(v, Tensor)]
                for target, value in zip(fresh, result, strict=False):
                    target.copy_(value)

    @staticmethod
    def _in_a_check() -> bool:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_name != TapeCapture.record.__name__:
            if frame.f_code.co_qualname in ONLY_ON_THE_CPU:
                return True
            frame = frame.f_back
        return False


class TapeCapture:
    """Captures on the CPU.

    Attributes:
        tapes: what was captured.
        warm_ups: calls that ran as they are.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.warm_ups = 0
        self.capturing = False

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def begin(self, device: torch.device) -> None:
        pass

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, str]:
        self.warm_ups += 1
        return function(), ""

    def record(self, function: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator]) -> Tape:
        tape, drawn = Tape(), [(g, g.get_state()) for g in (torch.default_generator, *generators)]
        self.capturing = True
        try:
            with tape, mock.patch.object(torch, "get_rng_state", _unreadable):
                tape.outputs = function()
        finally:
            self.capturing = False
            tape.undo()
            for generator, state in drawn:
                generator.set_state(state)
        self.tapes.append(tape)
        return tape

    @property
    def replays(self) -> int:
        """Replays of all tapes."""
        return sum(tape.replays for tape in self.tapes)


def _unreadable() -> Tensor:
    raise RuntimeError("the state of a generator cannot be read during a capture")


def _written(operator: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operator writes into."""
    found = []
    for position, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _returns_aliases(operator: Any) -> bool:
    """Whether the results are arguments or views of them, which a replay finds up to date."""
    return any(result.alias_info is not None for result in operator._schema.returns)


def _same_memory(tensor: Tensor) -> Tensor:
    """The tensor with a shape of its own, as operators may change that of a tensor in place."""
    return tensor.detach()


def _whole(tensor: Tensor) -> Tensor:
    """All memory of a tensor's storage, flat."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(storage)  # type: ignore[call-overload]


class _plainly:
    """Operators as they are: no gradients recorded, none asked for."""

    def __enter__(self) -> None:
        self._guard = torch._C._AutoDispatchBelowAutograd()
        self._grad = torch.no_grad()
        self._grad.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._grad.__exit__(*exception)
        del self._guard
