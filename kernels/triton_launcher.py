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
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

_LAUNCHERS = "triton.backends.nvidia.driver"
_MAPS = 256  # tensor maps kept of one argument


@dataclass(slots=True)
class DirectLaunch:
    """A launch through Triton's C function, with arguments that are replaced by those of another call.

    Attributes:
        function: The C function. It is called with `before`, a stream, `after` and the kernel's arguments.
        before: Its first arguments.
        after: Its arguments after the stream.
        arguments: Those of the kernel, as C has them.
        apart: Whether it takes these one by one, not in a list (Triton 3.6).
        pointers: (place among them, tensor, bytes past its first) of each address.
        boxes: (place among them, tensor, function of the tensor that encodes a tensor map) of each tensor map.
    """

    function: Callable[..., Any]
    before: Sequence[Any]
    after: Sequence[Any]
    arguments: list[Any]
    apart: bool
    pointers: list[tuple[int, int, int]]
    boxes: list[tuple[int, int, Callable[[Any], Any]]]

    @property
    def kind(self) -> str:
        """How the extension in C++ knows it."""
        return "triton"

    @property
    def most_maps(self) -> int:
        """How many tensor maps of one argument may be kept, by address."""
        return _MAPS

    @property
    def hooks(self) -> Any:
        """What has Triton's hooks, which want to hear of launches."""
        return knobs.runtime

    def runner(self) -> Callable[[list[Any], list[int], int], None]:
        """What starts it, as `recording.Again.run`."""
        function, before, after, arguments, apart = self.function, self.before, self.after, self.arguments, self.apart
        pointers = self.pointers
        boxes: list[tuple[int, int, Callable[[Any], Any], dict[int, Any]]] = [(*box, {}) for box in self.boxes]

        def launch(tensors: list[Any], addresses: list[int], stream: int) -> None:
            passed = arguments.copy()
            for at, tensor, past in pointers:
                passed[at] = addresses[tensor] + past
            for at, tensor, encode, known in boxes:
                address = addresses[tensor]
                encoded = known.get(address)
                if encoded is None:
                    if len(known) >= _MAPS:
                        known.clear()
                    encoded = known[address] = encode(tensors[tensor])
                passed[at] = encoded
            function(*before, stream, *after, *(passed if apart else (passed,)))

        return launch


def direct(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    pointers: Sequence[tuple[int, int, int]],
    boxes: Sequence[tuple[int, int]],
) -> DirectLaunch | None:
    """What repeats a launch through Triton's C function; None where that is not the one known here.

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
    encode = module.make_tensordesc_arg

    def encoder(descriptor: TensorDescriptor, metadata: Any) -> Callable[[Any], Any]:
        describe = described_like(descriptor)
        return lambda tensor: encode(describe(tensor), metadata)[0]

    at_boxes = [
        (places[position], tensor, encoder(arguments[position], metadata))
        for (position, tensor), metadata in zip(boxes, maps, strict=True)
    ]
    return DirectLaunch(bottom, before, after, template, apart, at_pointers, at_boxes)


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
