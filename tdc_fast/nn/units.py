"""What can be pruned: units of channels that are kept or dropped together, and where they are in the leaves."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.blocks import Block, block_of, narrow, set_width


@dataclass(frozen=True)
class UnitSlice:
    """Where a unit's channels are on one axis of one leaf.

    The axis has `copies` consecutive blocks of `channels * scale` entries; atom a of the unit is at entries
    [a * atom * scale, (a + 1) * atom * scale) of every block.

    Attributes:
        module: the leaf's path.
        dim: "out" (rows of the weight, the bias, a norm's weight and bias) or "in" (columns of the weight).
        copies: number of blocks.
        scale: entries per channel.
    """

    module: str
    dim: str
    copies: int = 1
    scale: int = 1


@dataclass(frozen=True)
class PruningUnit:
    """A set of channels with one width per expert.

    Attributes:
        name: path of the block; at width 0 the block is only its skip path.
        kind: "resblock", "attention" or "feed_forward".
        channels: full width.
        atom: channels kept or dropped together: those of one normalisation group, or of one attention head.
        step: granularity of the allowed widths in channels, a multiple of `atom`.
        slices: where the channels are.
    """

    name: str
    kind: str
    channels: int
    atom: int
    step: int
    slices: tuple[UnitSlice, ...]

    @property
    def num_atoms(self) -> int:
        """Number of atoms at full width."""
        return self.channels // self.atom

    def widths(self) -> tuple[int, ...]:
        """The allowed widths in channels, ascending: 0, step, ..., channels."""
        return tuple(range(0, self.channels + 1, self.step))

    def kept_rows(self, order: Sequence[int], width: int, part: UnitSlice) -> list[Tensor]:
        """Where the kept channels are on an axis.

        Args:
            order: the atoms, most important first.
            width: number of kept channels.
            part: the axis.

        Returns:
            Indices, int64 in host memory, one tensor per copy.
        """
        atoms = torch.tensor(list(order[: width // self.atom]), dtype=torch.int64, device="cpu")
        span = self.atom * part.scale
        rows = (atoms[:, None] * span + torch.arange(span, device="cpu")).flatten()
        return [rows + copy * self.channels * part.scale for copy in range(part.copies)]


@runtime_checkable
class Prunable(Protocol):
    """A denoiser whose units can be made narrower, such as `tdc_fast.models.iddpm.UNet`.

    It is also an `nn.Module`, which a protocol cannot require: see `module_of`.
    """

    def pruning_units(self) -> Sequence[PruningUnit]:
        """The units that can be pruned."""

    def with_widths(self, widths: Mapping[str, int]) -> nn.Module:
        """A prunable model of the same architecture, on the same device, with these widths.

        Args:
            widths: channels by name of the unit; units that are not named keep their width.
        """


@runtime_checkable
class HasLayerSets(Protocol):
    """A denoiser with names for sets of its layers, such as `tdc_fast.models.iddpm.UNet`."""

    def layer_sets(self) -> Mapping[str, Sequence[str]]:
        """Paths of layers with parameters, by the name of their set."""


def module_of(base: object, argument: str = "base") -> nn.Module:
    """The denoiser itself, as a module.

    Raises:
        ValueError: naming the argument, if it is not an `nn.Module` that can be pruned.
    """
    if not isinstance(base, nn.Module) or not (isinstance(base, Prunable) or _blocks(base)):
        needed = "pruning_units(), which lists its PruningUnits, and with_widths({unit: channels})"
        found = "blocks in which tdc_fast.nn.blocks finds inner channels, as diffusers' UNets and transformers have"
        raise invalid(argument, type(base).__name__, f"an nn.Module with {needed}, or with {found}")
    return base


def units_of(base: nn.Module | Prunable) -> list[PruningUnit]:
    """The units of a denoiser: its own `pruning_units()`, or those of the blocks found in it (`tdc_fast.nn.blocks`)."""
    if isinstance(base, Prunable):
        return list(base.pruning_units())
    return [_unit(path, block) for path, block in _blocks(base).items()]


def with_widths(base: nn.Module | Prunable, widths: Mapping[str, int]) -> nn.Module:
    """The denoiser with these widths, uninitialised, on the same device: its own `with_widths`, or a narrower copy.

    Args:
        base: the denoiser.
        widths: channels by name of the unit; units that are not named keep their width.
    """
    if isinstance(base, Prunable):
        return base.with_widths(widths)
    model = without_weights(base)
    narrow(model, widths)
    return with_memory(model, next(base.parameters()))


def set_unit_width(model: nn.Module, unit: PruningUnit, width: int) -> None:
    """Tells a block of a packed model the width of its widest expert; at 0 it becomes its skip path."""
    block: Any = model.get_submodule(unit.name)
    if not hasattr(block, "become_skip"):
        set_width(model, unit.name, width, unit.atom)
        return
    block.width = width
    if not width:
        block.become_skip()


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device; buffers keep their values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def with_memory(model: nn.Module, like: Tensor) -> nn.Module:
    """Gives the parameters of a model without weights memory, uninitialised; all is then on the device of `like`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty_like(parameter, device=like.device, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(value, parameter.requires_grad))
    return model.to(like.device)


def _blocks(model: nn.Module) -> dict[str, Block]:
    """The outermost blocks of a model by path, without those of which a layer is also in another place."""
    found: dict[str, Block] = {}
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for path, module in model.named_modules():
        block = block_of(module) if path else None
        if block is None or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if all(places[module.get_submodule(axis.layer)] == 1 for axis in block.axes):
            found[path] = block
    return found


def _unit(path: str, block: Block) -> PruningUnit:
    step = _feed_forward_step(block.channels) if block.kind == "feed_forward" else block.atom
    if block.kind == "resblock":
        step = width_step(block.channels, block.atom)
    slices = tuple(UnitSlice(f"{path}.{axis.layer}", axis.dim, axis.copies) for axis in block.axes)
    return PruningUnit(path, block.kind, block.channels, block.atom, step, slices)


def _feed_forward_step(channels: int) -> int:
    """Channels are dropped one by one, but at most 64 widths in multiples of 8 are tried."""
    least = width_step(channels, 1)
    return next(step for step in range(least, channels + 1, least) if channels % step == 0 and channels // step <= 64)


def width_step(channels: int, atom: int) -> int:
    """Width granularity of a convolution: a multiple of the atom and of 8 channels (16-byte loads), else the atom.

    It is the atom for layers of at most 8 channels, and for those that the larger step does not divide.
    """
    step = math.lcm(atom, 8)
    return step if channels % step == 0 and channels > step else atom
