"""What can be pruned: units of channels that live and die together, and where they sit in the leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid


@dataclass(frozen=True)
class UnitSlice:
    """Where a unit's channels sit on one axis of one leaf.

    ``module`` is the leaf's path; ``dim`` is ``'out'`` (rows of the weight, the bias, a norm's affine) or ``'in'``
    (columns). The axis holds ``copies`` consecutive blocks of ``channels * scale`` entries; atom a of the unit occupies
    entries [a * atom * scale, (a + 1) * atom * scale) of every block.
    """

    module: str
    dim: str
    copies: int = 1
    scale: int = 1


@dataclass(frozen=True)
class PruningUnit:
    """A set of channels with one width per expert.

    channels : full width.
    atom     : channels kept or dropped together (one GroupNorm group; one attention head).
    step     : granularity of the allowed widths in channels, a multiple of ``atom``.
    kind     : ``'resblock'`` or ``'attention'``. At width 0 the module called ``name`` is only its skip path.
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
        """Indices (int64) into ``part``'s axis of the first ``width`` channels of ``order``, one tensor per copy."""
        atoms = torch.as_tensor(list(order[: width // self.atom]), dtype=torch.int64)
        span = self.atom * part.scale
        rows = (atoms[:, None] * span + torch.arange(span)).flatten()
        return [rows + copy * self.channels * part.scale for copy in range(part.copies)]


class Prunable(Protocol):
    """A denoiser whose units can be made narrower, such as :class:`tdc_fast.models.iddpm.UNet`.

    It is an ``nn.Module`` too, which a protocol cannot say: see :func:`module_of`.
    """

    def pruning_units(self) -> Sequence[PruningUnit]:
        """Return the units, with their full widths and where they sit."""

    def with_widths(self, widths: Mapping[str, int]) -> nn.Module:
        """Return a model of the same architecture and device with these widths, itself prunable.

        Args:
            widths: channels by name of the unit; units that are not named keep their width.
        """


def module_of(base: Prunable) -> nn.Module:
    """The same object as the module that it is.

    Raises:
        ValueError: it is no ``nn.Module``.
    """
    if not isinstance(base, nn.Module):
        raise invalid("base", type(base).__name__, "an nn.Module with pruning_units() and with_widths()")
    return base


def width_step(channels: int, atom: int) -> int:
    """Width granularity of a convolution: a multiple of the atom and of 8 channels (16-byte loads), else the atom.

    Layers of at most 8 channels, and those that such steps do not divide, go by single atoms.
    """
    step = math.lcm(atom, 8)
    return step if channels % step == 0 and channels > step else atom
