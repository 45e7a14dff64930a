"""How the weights of experts are laid out in the stacked parameters of a routed leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.nn.per_group import own_parameters
from tdc_fast.nn.sharing import Rows
from tdc_fast.nn.units import PruningUnit, UnitSlice
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.ops.pack import pack_channels


def slices_by_leaf(units: Sequence[PruningUnit]) -> dict[str, dict[str, tuple[PruningUnit, UnitSlice]]]:
    """The unit and slice on each axis, "out" or "in", of every leaf that has one."""
    found: dict[str, dict[str, tuple[PruningUnit, UnitSlice]]] = {}
    for unit in units:
        for part in unit.slices:
            entry = found.setdefault(part.module, {})
            if part.dim in entry:
                raise invalid(f"unit {unit.name!r}", part.module, "channels that no other unit has")
            entry[part.dim] = (unit, part)
    return found


@torch.no_grad()
def fill(
    leaf: RoutedLeaf,
    layers: Sequence[nn.Module],
    slices: Mapping[str, tuple[PruningUnit, UnitSlice]],
    widths: WidthPlan | None,
    members: Sequence[Sequence[int]],
) -> None:
    """Write every expert's kept channels, most important first, into the stacked parameters, one launch for each.

    Args:
        leaf: receives the weights.
        layers: the dense layer of every row of the parameters, or one that all rows start from.
        slices: the unit on each axis that has one.
        widths: the experts' widths, in orders that are common to groups of one row; None where no expert is pruned.
        members: the groups that use each row.
    """
    device = next(leaf.parameters()).device
    cuts: dict[str, Tensor] = {}
    for dim, (unit, part) in slices.items():
        axis = leaf.live_out if dim == "out" else leaf.live_in
        assert widths is not None and axis is not None
        # Stacked position -> dense channel.
        order = torch.zeros(leaf.num_experts, axis.size, dtype=torch.int32, device="cpu")
        widest = [max(groups, key=axis.counts.__getitem__) for groups in members]
        for row, group in enumerate(widest):
            entry = widths.experts[group][unit.name]
            channels = torch.cat(unit.kept_rows(entry.order, entry.width, part))
            order[row, axis.positions(group)] = channels.to(torch.int32)
        live = [axis.counts[group] * axis.copies for group in widest]
        cuts[f"{dim}_order"] = order.to(device)
        cuts[f"{dim}_widths"] = torch.tensor(live, dtype=torch.int32, device=device)
    for name, parameter in leaf.named_parameters():
        dense = [layer.get_parameter(name).to(parameter.device, parameter.dtype) for layer in layers]
        source = dense[0][None] if len(dense) == 1 else torch.stack(dense)
        source = source.flatten(2) if parameter.dim() == 3 else source  # a 1x1 Conv1d's filter axis
        own = {key: cut for key, cut in cuts.items() if key.startswith("out") or parameter.dim() > 2}
        if own:
            pack_channels(source, **own, out=parameter)
        else:
            parameter.copy_(source)


def apart_where_closed(rows: Rows, live: Sequence[int]) -> Rows:
    """Another row for the groups without the unit, whose last layer has no bias; it is one for all of them.

    Args:
        rows: the row of each group in a unit's last layer.
        live: the unit's live channels, by group.
    """
    kept = sorted({row for row, count in zip(rows, live, strict=True) if count})
    return tuple(kept.index(row) if count else len(kept) for row, count in zip(rows, live, strict=True))


def check_equal(name: str, sets: Sequence[Sequence[nn.Module]]) -> None:
    """Raises ValueError, naming the layer, unless the layers of every set have equal parameters."""
    for first, *others in sets:
        for other in others:
            for key, parameter in own_parameters(first).items():
                if other is not first and not torch.equal(parameter, other.get_parameter(key)):
                    remedy = f"other layers than {name}, or experts with the same {key} there; these differ"
                    raise invalid("shared_layers", name, remedy)
