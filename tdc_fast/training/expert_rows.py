"""Rows of a routed model's parameters by the groups that use them, for what stage 2 does group by group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tdc_fast.nn.packing import RoutedModel
from tdc_fast.nn.sharing import Rows, sharers
from tdc_fast.training.optimization import gradient_norm


@dataclass(frozen=True)
class Block:
    """Parameters whose rows are used by the same groups.

    Attributes:
        rows: for each of the N groups its row.
        parameters: (E, ...) each.
    """

    rows: Rows
    parameters: tuple[nn.Parameter, ...]

    @cached_property
    def num_rows(self) -> int:
        """E."""
        return max(self.rows) + 1

    @cached_property
    def shared_runs(self) -> list[tuple[float, slice]]:
        """Neighbouring rows that equally many groups share, with the number of groups, where it is above 1."""
        return [(count, rows) for count, rows in _runs([float(len(own)) for own in sharers(self.rows)]) if count > 1]

    def means(self, of_groups: Sequence[float]) -> list[float]:
        """For each row the mean of its groups' numbers; a row of equal numbers has exactly that number."""
        own = [[of_groups[group] for group in groups] for groups in sharers(self.rows)]
        return [values[0] if len(set(values)) == 1 else sum(values) / len(values) for values in own]


def blocks_of(model: nn.Module) -> list[Block]:
    """All parameters of a routed model in blocks; without sharing it is one block. None for another model."""
    if not isinstance(model, RoutedModel):
        return []
    found: dict[Rows, list[nn.Parameter]] = {}
    for leaf in model.routed_leaves().values():
        rows = tuple(range(model.num_experts)) if leaf.rows is None else leaf.rows
        found.setdefault(rows, []).extend(leaf.own_parameters().values())
    return [Block(rows, tuple(parameters)) for rows, parameters in found.items()]


def runs_of_rows(blocks: Sequence[Block], of_groups: Sequence[float]) -> dict[float, list[tuple[nn.Parameter, slice]]]:
    """All parameters in parts of neighbouring rows that have one number.

    Args:
        blocks: of a model.
        of_groups: a number for each group; rows that groups share have the mean of theirs.

    Returns:
        By number its parts: a parameter and its rows.
    """
    found: dict[float, list[tuple[nn.Parameter, slice]]] = {}
    for block in blocks:
        for value, rows in _runs(block.means(of_groups)):
            found.setdefault(value, []).extend((parameter, rows) for parameter in block.parameters)
    return found


def _runs(values: Sequence[float]) -> Iterator[tuple[float, slice]]:
    start = 0
    for value, run in itertools.groupby(values):
        count = len(list(run))
        yield value, slice(start, start + count)
        start += count


@torch.no_grad()
def clip_by_row(blocks: Sequence[Block], limit: float) -> Tensor:
    """The norm of all gradients before each row is clipped by its own norm, over all parameters of its block.

    A row that groups share first gets the mean of its groups' gradients in place of their sum.

    Args:
        blocks: of a model.
        limit: the largest norm of a row; 0 does not clip.

    Returns:
        0-dim tensor; nothing is read back to the host.
    """
    norms = []
    for block in blocks:
        trained = [parameter for parameter in block.parameters if parameter.grad is not None]
        if not trained:
            continue
        for count, rows in block.shared_runs:
            torch._foreach_mul_([parameter.grad[rows] for parameter in trained], 1 / count)  # type: ignore[index]
        norms.append(gradient_norm(trained, limit, block.num_rows))
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


class SlowRows:
    """Learning rates below the optimizer's for the rows of some groups.

    AdamW's step is its rate times what does not depend on the rate. So each row takes a whole step and is then moved
    back by the share of it that its rate lacks. A row with the whole rate is left as the optimizer leaves it.

    Args:
        blocks: of the model.
        factors: each group's rate as a share of the optimizer's, above 0 and at most 1.
    """

    def __init__(self, blocks: Sequence[Block], factors: Sequence[float]) -> None:
        self._parts = {
            1.0 - factor: [parameter.detach()[rows] for parameter, rows in parts]
            for factor, parts in runs_of_rows(blocks, factors).items()
            if factor != 1
        }
        self._before = {lacking: [torch.empty_like(rows) for rows in parts] for lacking, parts in self._parts.items()}

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the weights, before the optimizer's step."""
        for lacking, parts in self._parts.items():
            torch._foreach_copy_(self._before[lacking], parts)

    @torch.no_grad()
    def move_back(self) -> None:
        """Undo what is too much of the step."""
        for lacking, parts in self._parts.items():
            torch._foreach_lerp_(parts, self._before[lacking], lacking)
