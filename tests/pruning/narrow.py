"""One pruned candidate as an ordinary, smaller module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn


def narrow(model: nn.Module, orders: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> nn.Module:
    """A copy of `model` with the first `widths[unit]` channels of each unit, its atoms taken in `orders[unit]`.

    `model` offers `pruning_units()` and `with_widths(widths)`; the copy has its device, dtype and mode. The same
    weights that `pack_experts` gives an expert of these orders and widths.
    """
    state = dict(model.state_dict())
    for unit in model.pruning_units():  # type: ignore[operator]
        for part in unit.slices:
            rows = torch.cat(unit.kept_rows(orders[unit.name], widths[unit.name], part))
            for name in ("weight", "bias") if part.dim == "out" else ("weight",):
                key = f"{part.module}.{name}"
                if key in state:
                    state[key] = state[key].index_select(0 if part.dim == "out" else 1, rows.to(state[key].device))
    small: nn.Module = model.with_widths(widths)  # type: ignore[operator]
    small.load_state_dict({key: state[key] for key in small.state_dict()})
    return small
