"""Calls that only allocate tensors and launch kernels: done once by the backend, then repeated from a recording.

A call of a native kernel for host memory counts as a launch (native_call.py).

What a backend does between its entry and its launches depends on the metadata of the tensors alone: tiles, grids,
scalar arguments, sizes of results and of workspaces. So the recording holds a list of tensors to allocate and a list of
launches, whose tensors are places among the arguments of the call and in the allocated ones. To repeat it is to
allocate, to take all addresses, and to launch.

Only a call that can be repeated so is: every operator of torch within it must allocate or make a view (a copy into
another memory order is neither), and every tensor of a launch must be an argument or lie in an allocated one. Memory
that was aligned to 16 bytes when the call was recorded must be again; otherwise the backend does the call.

Where there is the extension in C++ (host.py), a recording is a program of it, else a function in Python (`_again`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdc_fast.kernels.recording import Again, Recorded, record_into
from tdc_fast.ops import host
from tdc_fast.ops.cuda_device import current_device_is, current_stream

_aten = torch.ops.aten
_ALLOCATE = {op.default for op in (_aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)} | {
    _aten.empty.memory_format
}
_VIEW = {
    op.default for op in (_aten.permute, _aten.view, _aten.detach, _aten.alias, _aten.unsqueeze, _aten.squeeze)
} | {_aten.slice.Tensor, _aten.select.int}
_ALIGNMENT = 16  # bytes
_data_ptr = Tensor.data_ptr
_NAMES = {"cpu": "_empty_strided_cpu", "cuda": "_empty_strided_cuda"}
# Of sizes, strides and a dtype, on the current device; torch's compiler has them to allocate below the dispatcher.
_EMPTY = {device: getattr(torch._C._dynamo.guards, name, None) for device, name in _NAMES.items()}


class Replayed:
    """A function of tensors and settings that is recorded at its first call and repeated at later ones.

    Attributes:
        again: Repeats it, given the arguments and a stream; None until it was recorded.
    """

    __slots__ = ("_device", "_index", "_run", "_tensors", "again")

    def __init__(self, run: Callable[..., Any], device: torch.device, tensors: int) -> None:
        """Wraps a function.

        Args:
            run: What a backend does; its results depend on the contents of the tensors and on their metadata, which
                are the same at every call.
            device: Where the tensors are.
            tensors: How many of its arguments are tensors or None; they come first.
        """
        self._run, self._tensors, self._device = run, tensors, device
        self._index = device.index if device.type == "cuda" else None
        self.again: Callable[[tuple[Any, ...], int], Any] | None = None

    @property
    def never_repeats(self) -> bool:
        """Whether the recorded call turned out to be one that the backend has to do every time."""
        return self.again is _never

    def __call__(self, *args: Any) -> Any:
        """The result of `run`."""
        again = self.again
        if again is None:
            return self._record(args)
        index = self._index
        if index is None:
            result = again(args, 0)
        else:
            result = again(args, current_stream(index)) if current_device_is(index) else None
        return self._run(*args) if result is None else result

    def _record(self, args: tuple[Any, ...]) -> Any:
        launches: list[Recorded] = []
        try:
            with _Allocations() as allocations:
                record_into(launches)
                result = self._run(*args)
            record_into(None)
        except BaseException:
            _end_recording()
            raise
        extension = host.extension(self._device)
        make = _again if extension is None else extension.Program
        self.again = _repetition(list(args[: self._tensors]), allocations, launches, result, make) or _never
        return result


def _never(args: tuple[Any, ...], stream: int) -> None:
    """Stands for a call that cannot be repeated."""


class _Allocations(TorchDispatchMode):
    """Notes the tensors that are allocated within it.

    Attributes:
        made: The tensors.
        nothing_else: Whether torch did nothing but to allocate them, and to make views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.nothing_else = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps `__torch_dispatch__` so that its compiler does not trace it.

        The wrapper imports the compiler, which takes a second, and which skips what runs within a mode anyway.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            self.made.append(out)
        elif func not in _VIEW:
            self.nothing_else = False
        return out


def _end_recording() -> None:
    """Ends what a recording began, also where Ctrl-C came while its mode of torch was entered or left.

    Both are code in Python, which an interrupt can end half way. No other mode is active where a call is recorded
    (call_cache.py).
    """
    record_into(None)
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    with _Allocations() as mode:  # its end restores what torch notes besides: here, that no mode is active
        for name, before in vars(mode).items():
            if name.startswith("old_"):
                before.clear()
                before.append(False)


def _repetition(
    arguments: list[Any],
    allocations: _Allocations,
    launches: list[Recorded],
    result: Any,
    make: Callable[..., Callable[[tuple[Any, ...], int], Any]],
) -> Callable[[tuple[Any, ...], int], Any] | None:
    """From what a call did to a function of the arguments of another, and a stream, that does it; None if none does.

    Args:
        arguments: The call's arguments that are tensors or None.
        allocations: What it did in torch.
        launches: What it launched.
        result: A tensor, or a list or tuple of tensors.
        make: `_again`, or what takes its place in the extension in C++.
    """
    if not allocations.nothing_else:
        return None
    results = [result] if isinstance(result, Tensor) else list(result)
    made = [_final(tensor, results) for tensor in allocations.made]
    # Each tensor once: a call in which others are one tensor is not repeated from this one (call_cache.py).
    firsts = {id(tensor): index for index, tensor in reversed([*enumerate(arguments)]) if tensor is not None}
    given = sorted(firsts.values())
    tensors = [arguments[index] for index in given] + made
    addresses = [tensor.data_ptr() for tensor in tensors]

    def place(address: int) -> tuple[int, int]:
        if addresses.count(address) == 1:
            return addresses.index(address), 0
        for index in range(len(given), len(tensors)):  # arguments may overlap, allocated tensors do not
            if 0 < address - addresses[index] < tensors[index].nbytes:
                return index, address - addresses[index]
        raise KeyError(address)

    try:
        repeats = [launch.again(place) for launch in launches]
        places = [_index(made, tensor) + len(given) for tensor in results]
    except KeyError:
        return None
    empties = [_allocator(tensor) for tensor in made]
    if None in repeats or None in empties or len(set(places)) < len(places):
        return None
    aligned = [index for index, address in enumerate(addresses) if address % _ALIGNMENT == 0]
    kind = None if isinstance(result, Tensor) else type(result)
    return make(given, empties, repeats, aligned, places, kind)


def _final(made: Tensor, results: list[Tensor]) -> Tensor:
    """The result that is a view of all of an allocated tensor, where there is one, else the tensor itself."""
    storage = made.untyped_storage()._cdata
    for result in results:
        if result.untyped_storage()._cdata == storage and result.numel() == made.numel():
            return result
    return made


def _index(tensors: list[Tensor], wanted: Tensor) -> int:
    """Where a tensor is in a list; KeyError if it is not."""
    for index, tensor in enumerate(tensors):
        if tensor is wanted:
            return index
    raise KeyError(wanted)


def _allocator(like: Tensor) -> Callable[[], Tensor] | None:
    """A function that allocates a tensor of the same metadata; None where its memory would not be dense."""
    template = torch.empty_like(like)
    if template.stride() != like.stride():
        return None
    empty = _EMPTY.get(like.device.type)
    if empty is not None:
        return partial(empty, tuple(like.shape), like.stride(), like.dtype)
    template.untyped_storage().resize_(0)  # the metadata is all that is kept
    return partial(torch.empty_like, template)


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function from a sequence to its items at some places; operator.itemgetter returns one item by itself."""
    return itemgetter(*places) if len(places) > 1 else lambda items: [items[place] for place in places]


def _again(
    given: list[int],
    empties: list[Callable[[], Tensor]],
    launches: list[Again],
    aligned: list[int],
    results: list[int],
    kind: Any,
) -> Callable[[tuple[Any, ...], int], Any]:
    """The function that allocates, takes addresses and launches; it returns None where memory is less aligned.

    Args:
        given: Which arguments are tensors.
        empties: What allocates; these tensors come after those that are given.
        launches: What launches.
        aligned: Which tensors have to be aligned.
        results: Which tensors are results.
        kind: None for one result that is a tensor, else the type of their list.
    """
    of_arguments, to_check = picker(given), picker(aligned)
    runs = [launch.run for launch in launches]

    def again(args: tuple[Any, ...], stream: int) -> Any:
        tensors = [*of_arguments(args), *[empty() for empty in empties]]
        addresses = [*map(_data_ptr, tensors)]
        if reduce(or_, to_check(addresses), 0) % _ALIGNMENT:
            return None
        for run in runs:
            run(tensors, addresses, stream)
        return tensors[results[0]] if kind is None else kind([tensors[place] for place in results])

    return again
