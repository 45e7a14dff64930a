"""What can be pruned: units of channels that are kept or dropped together, and where they are in the leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid


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
        kind: "resblock" or "attention".
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
            Indices, int64, one tensor per copy.
        """
        atoms = torch.as_tensor(list(order[: width // self.atom]), dtype=torch.int64)
        span = self.atom * part.scale
        rows = (atoms[:, None] * span + torch.arange(span)).flatten()
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
    if not (isinstance(base, nn.Module) and isinstance(base, Prunable)):
        needed = "pruning_units(), which lists its PruningUnits, and with_widths({unit: channels})"
        raise invalid(argument, type(base).__name__, f"an nn.Module with {needed}, as tdc_fast.models.iddpm.UNet has")
    return base


def width_step(channels: int, atom: int) -> int:
    """Width granularity of a convolution: a multiple of the atom and of 8 channels (16-byte loads), else the atom.

    It is the atom for layers of at most 8 channels, and for those that the larger step does not divide.
    """
    step = math.lcm(atom, 8)
    return step if channels % step == 0 and channels > step else atom
