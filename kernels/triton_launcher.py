"""The C function at the bottom of Triton's launcher, called with arguments that were prepared once.

Between a launch and that function Triton walks the kernel's arguments in Python and has the driver encode every tensor
map anew, which takes longer than the function itself. Here one launch is watched on its way down. What it passed is
kept; later ones replace the stream, the addresses, and the tensor maps, which are kept by address: a map depends on the
address and on the constants of the launch alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tdc_fast.kernels.recording import Again

_LAUNCHERS = "triton.backends.nvidia.driver"
_MAPS = 256  # tensor maps kept of one argument
# Position, tensor, its descriptor, what Triton knows of the descriptor, maps by address.
_Box = tuple[int, int, Callable[[Any], TensorDescriptor], Any, dict[int, Any]]


def direct(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    pointers: Sequence[tuple[int, int, int]],
    boxes: Sequence[tuple[int, int]],
) -> Again | None:
    """A function that repeats a launch through Triton's C function; None where that is not the one known here.

    Args:
        kernel: A compiled kernel.
        grid: Its programs.
        arguments: All its arguments in order, as they were launched.
        pointers: (position, tensor, bytes past its first) of each argument that is an address.
        boxes: (position, tensor) of each argument that is a TensorDescriptor.
    """
    launcher = kernel.run
    if type(launcher).__module__ != _LAUNCHERS:
        return None
    module = sys.modules[_LAUNCHERS]
    stream, passed = object(), []
    try:
        signature, maps = kernel.src.signature, getattr(kernel.metadata, "tensordesc_meta", None) or []
        bottom = _bottom(launcher.launch)
        if launcher.global_scratch_size or launcher.profile_scratch_size or len(maps) != len(boxes) or None in maps:
            return None
        watched = copy.copy(launcher)
        watched.launch = module.wrap_handle_tensordesc(lambda *given: passed.append(given), signature, maps)
        watched(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
        (given,) = passed
        before, after = given[: given.index(stream)], given[given.index(stream) + 1 :]
        apart = not isinstance(after[-1], (list, tuple))  # Triton 3.6 has no sequence for the kernel's arguments
        count = sum(1 + 2 * len(a.shape) if isinstance(a, TensorDescriptor) else 1 for a in arguments)
        after, last = (after[:-count], after[-count:]) if apart else (after[:-1], after[-1])
        places = _places(arguments, last, module.PyCUtensorMap)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # another version of Triton
        return None
    if places is None:
        return None
    template = list(last)
    for position, argument in enumerate(arguments):
        if isinstance(argument, (Tensor, TensorDescriptor)):
            template[places[position]] = 0  # also where there is no memory
    at_pointers = [(places[position], tensor, past) for position, tensor, past in pointers]
    at_boxes: list[_Box] = [
        (places[position], tensor, described_like(arguments[position]), metadata, {})
        for (position, tensor), metadata in zip(boxes, maps, strict=True)
    ]
    encode = module.make_tensordesc_arg

    def launch(tensors: list[Any], addresses: list[int], stream: int) -> None:
        passed = template.copy()
        for at, tensor, past in at_pointers:
            passed[at] = addresses[tensor] + past
        for at, tensor, describe, metadata, known in at_boxes:
            address = addresses[tensor]
            encoded = known.get(address)
            if encoded is None:
                if len(known) >= _MAPS:
                    known.clear()
                encoded = known[address] = encode(describe(tensors[tensor]), metadata)[0]
            passed[at] = encoded
        bottom(*before, stream, *after, *(passed if apart else (passed,)))

    return launch


def _bottom(launch: Any) -> Any:
    """The C function; where a kernel has descriptors, Triton's function that walks its arguments holds it."""
    held = getattr(launch, "__closure__", None)
    return dict(zip(launch.__code__.co_freevars, held, strict=True))["launcher"].cell_contents if held else launch


def _places(arguments: Sequence[Any], passed: Sequence[Any], map_type: type) -> list[int] | None:
    """Where each argument is among those that were passed; None where they are not those that are expected.

    A descriptor is a tensor map, then its shape and strides.
    """
    places, at = [], 0
    for argument in arguments:
        places.append(at)
        if isinstance(argument, TensorDescriptor):
            numbers = [*argument.shape, *argument.strides]
            if type(passed[at]) is not map_type or list(passed[at + 1 : at + 1 + len(numbers)]) != numbers:
                return None
            at += len(numbers)
        elif passed[at] is not argument:
            return None
        at += 1
    return places if at == len(passed) else None


def described_like(descriptor: TensorDescriptor) -> Callable[[Any], TensorDescriptor]:
    """A function that makes the same descriptor of another tensor, without the checks that this one has passed."""
    fields = vars(descriptor) | {"base": None}

    def describe(tensor: Any) -> TensorDescriptor:
        other = TensorDescriptor.__new__(TensorDescriptor)
        vars(other).update(fields, base=tensor)
        return other

    return describe
