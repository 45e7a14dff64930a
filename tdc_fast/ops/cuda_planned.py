"""Launches of the `cuda` backend that can be repeated: the bytes of their parameters, with other addresses.

A planner is a function of sizes and addresses, and no address decides anything but where it is written. That is
checked, not trusted: a recorded call is planned twice more, with two sets of invented addresses, and is repeated only
if the launches differ in the bytes of those addresses and nowhere else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from tdc_fast.kernels.recording import Again, Place
from tdc_fast.ops import native
from tdc_fast.ops.cuda_device import Launcher

_POINTER = struct.Struct("<Q")
_LARGEST_SIZE = 2**32  # what is larger must be an address
_APART = 2**40  # distance of invented addresses; what lies between is an offset into a workspace

_Pointers = list[tuple[int, int, int]]  # (offset, tensor, bytes past its first)
# All of a launch but its parameters; the parameters; the addresses in them: (offset, name, bytes past its address)
_Form = tuple[dict[str, Any], bytes, list[tuple[int, str, int]]]


class Planned:
    """The launches of one call of a planner.

    Attributes:
        plan: Plans the same with some arguments replaced.
        arguments: Of the planner.
        launcher: What runs the launches.
        device: Where.
    """

    def __init__(
        self,
        plan: Callable[[dict[str, int]], Sequence[Any]],
        arguments: dict[str, Any],
        launcher: Launcher,
        device: torch.device,
    ) -> None:
        self.plan, self.arguments, self.launcher, self.device = plan, arguments, launcher, device

    def again(self, place: Place) -> Again | None:
        """What repeats the launches (recording.py); None where addresses decide more than their bytes."""
        places: dict[str, tuple[int, int]] = {}
        for name, value in self.arguments.items():
            if type(value) is int and value:
                try:
                    places[name] = place(value)
                except KeyError:
                    if value >= _LARGEST_SIZE:
                        raise
        forms = _forms(self.plan, list(places))
        if forms is None:
            return None
        located = [
            (fields, params, [(offset, places[name][0], places[name][1] + past) for offset, name, past in pointers])
            for fields, params, pointers in forms
        ]
        form = PlannedLaunches(self.launcher.run, self.device, native.module.Launch, located)
        return Again(form.runner(), form)


@dataclass(slots=True)
class PlannedLaunches:
    """Planned launches with the addresses of another call in their parameters.

    Attributes:
        run: Runs launches on a device.
        device: Where.
        make: Makes a launch of its fields, as keywords.
        forms: Of each launch all fields but its parameters; these; and the addresses in them.
    """

    run: Callable[[Sequence[Any], torch.device], None]
    device: torch.device
    make: Callable[..., Any]
    forms: list[tuple[dict[str, Any], bytes, _Pointers]]

    @property
    def kind(self) -> str:
        """How the extension in C++ knows them."""
        return "planned"

    def runner(self) -> Callable[[list[Any], list[int], int], None]:
        """What starts them, as `recording.Again.run`."""
        run, device = self.run, self.device
        parts = [_part(partial(self.make, **fields), params, pointers) for fields, params, pointers in self.forms]

        def launch(tensors: list[Any], addresses: list[int], stream: int) -> None:
            run([part(addresses) for part in parts], device)

        return launch


def _part(make: Callable[..., Any], params: bytes, pointers: _Pointers) -> Callable[[list[int]], Any]:
    """A function from the addresses of tensors to a launch.

    Args:
        make: Makes it of its parameters.
        params: These.
        pointers: The addresses in them.
    """
    ends = [0, *(offset + _POINTER.size for offset, _, _ in pointers)]
    starts = [*(offset for offset, _, _ in pointers), len(params)]
    between = [params[end:start] for end, start in zip(ends, starts, strict=True)]
    count = len(pointers)
    order = [0, *(place for index in range(count) for place in (count + 1 + index, index + 1))]
    in_turn: Callable[..., tuple[Any, ...]] = itemgetter(*order) if count else tuple  # one item would come alone
    layout = "<" + "Q".join(f"{len(piece)}s" for piece in between)
    pack = struct.Struct(layout).pack
    sources = [(tensor, past) for _, tensor, past in pointers]

    def part(addresses: list[int]) -> Any:
        words = in_turn(between + [addresses[tensor] + past for tensor, past in sources])
        return make(params=pack(*words))

    return part


def _forms(plan: Callable[[dict[str, int]], Sequence[Any]], names: list[str]) -> list[_Form] | None:
    """The launches of a plan and where in their parameters the addresses are; None where these decide more."""
    count, forms = len(names), []
    first = {name: (index + 1) * _APART for index, name in enumerate(names)}
    second = {name: (2 * count - index) * _APART for index, name in enumerate(names)}  # in the opposite order
    ones, others = plan(first), plan(second)
    if len(ones) != len(others):
        return None
    for one, other in zip(ones, others, strict=True):
        fields, memory = _fields(one), bytearray(one.params)
        if fields != _fields(other) or len(memory) != len(other.params):
            return None
        pointers = []
        for offset in range(0, len(memory) - 7, _POINTER.size):
            (value,), (changed,) = _POINTER.unpack_from(memory, offset), _POINTER.unpack_from(other.params, offset)
            if value == changed:
                continue
            index, past = divmod(value, _APART)
            name = names[index - 1] if 1 <= index <= count else ""
            if not name or changed != second[name] + past:
                return None
            pointers.append((offset, name, past))
            _POINTER.pack_into(memory, offset, changed)
        if bytes(memory) != other.params:
            return None
        forms.append((fields, other.params, pointers))
    return forms


def _fields(launch: Any) -> dict[str, Any]:
    """All of a launch but its parameters."""
    names = ("kernel", "grid", "threads", "shared_bytes", "shapes", "tensor_maps")
    return {name: getattr(launch, name) for name in names}
