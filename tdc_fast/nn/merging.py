"""Experts of one base, merged into one dense model of its architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.nn.stacking import slices_by_leaf
from tdc_fast.nn.units import units_of
from tdc_fast.nn.width_plan import ExpertUnit

Method = Literal["average", "task_arithmetic"]
Missing = Literal["base", "zero"]


@dataclass(frozen=True, kw_only=True)
class Merging:
    """How experts become one model.

    Attributes:
        method: "average": sum of w_i expert_i. "task_arithmetic" (Ilharco et al. 2023, arXiv:2212.04089; for diffusion
            models Ma et al. 2024, arXiv:2410.06664): base + scale * sum of w_i (expert_i - base). With a scale of 1 and
            weights that sum to 1, both are the same.
        weights: w_i, one for each expert; () for 1 / N each. An average divides them by their sum.
        scale: of task arithmetic.
        missing: what fills the channels that a pruned expert lacks: "base", the base's weights, or "zero", with which
            the expert computes the same as before.
    """

    method: Method = "average"
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    missing: Missing = "base"

    def __post_init__(self) -> None:
        for name, known in (("method", ("average", "task_arithmetic")), ("missing", ("base", "zero"))):
            if getattr(self, name) not in known:
                raise invalid(name, getattr(self, name), " or ".join(known))
        finite = all(math.isfinite(value) for value in (*self.weights, self.scale))
        if not finite:
            raise invalid("weights", self.weights, "finite numbers, and a finite scale")
        if self.method == "average":
            if self.scale != 1:
                raise invalid("scale", self.scale, "1, or --method task_arithmetic, which has a scale")
            if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
                raise invalid("weights", self.weights, "numbers of at least 0, one of them above, for an average")

    def shares(self, count: int) -> list[float]:
        """What each of `count` experts is multiplied by.

        Raises:
            ValueError: there is another number of weights.
        """
        if self.weights and len(self.weights) != count:
            raise invalid("weights", self.weights, f"one number for each of the {count} experts")
        weights = list(self.weights) or [1 / count] * count
        if self.method == "average":
            return [weight / sum(weights) for weight in weights]
        return [self.scale * weight for weight in weights]


@torch.no_grad()
def full_state(
    base: nn.Module, state: Mapping[str, Tensor], units: Mapping[str, ExpertUnit] | None, missing: Missing = "base"
) -> dict[str, Tensor]:
    """The state dict of an expert in the shapes of its base, every channel at its place there.

    Args:
        base: the dense model that the expert was cut from.
        state: the expert's, as `RoutedModel.expert_state` gives it.
        units: what the expert keeps (`WidthPlan.experts[i]`); None for a whole expert.
        missing: what the channels that it lacks have, see `Merging`. A block of width 0 lacks all its weights.
    """
    slices = slices_by_leaf(units_of(base)) if units is not None else {}
    full = {}
    for name, value in base.state_dict().items():
        full[name] = value.clone() if missing == "base" or not value.is_floating_point() else torch.zeros_like(value)
        if name not in state:
            continue
        index = []
        for length, dim in zip(value.shape, ("out", "in"), strict=False):  # further axes are a filter's
            entry = slices.get(name.rpartition(".")[0], {}).get(dim)
            if entry is None or units is None:
                index.append(torch.arange(length, device="cpu"))
            else:
                unit, part = entry
                kept = units[unit.name]
                index.append(torch.cat(unit.kept_rows(kept.order, kept.width, part)))
        if not index:
            full[name] = state[name].clone()
        else:
            full[name][torch.meshgrid(*(rows.to(value.device) for rows in index), indexing="ij")] = state[name]
    return full


def expert_states(model: RoutedModel, base: nn.Module, missing: Missing = "base") -> list[dict[str, Tensor]]:
    """The `full_state` of every expert of a packed model."""
    plan = model.widths
    return [
        full_state(base, model.expert_state(i), None if plan is None else plan.experts[i], missing)
        for i in range(model.num_experts)
    ]


@torch.no_grad()
def merge_states(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], merging: Merging
) -> dict[str, Tensor]:
    """The state dict of the merged model, summed in float64.

    Args:
        base: the base's state dict; an average takes from it only what is not floating point.
        experts: the experts' state dicts, all with the base's names and shapes.
        merging: how.

    Raises:
        ValueError: another number of weights than experts, or other names or shapes.
        FloatingPointError: a sum is not finite; names the tensor.
    """
    if not experts:
        raise invalid("experts", "none", "at least one")
    for number, state in enumerate(experts):
        for name in sorted(base.keys() ^ state.keys()):
            raise invalid(f"experts[{number}]", name, "the names of the base's tensors; this one is missing or unknown")
        for name, value in base.items():
            if state[name].shape != value.shape:
                raise invalid(f"experts[{number}][{name!r}]", tuple(state[name].shape), f"shape {tuple(value.shape)}")
    shares = merging.shares(len(experts))
    merged = {}
    for name, value in base.items():
        if not value.is_floating_point():
            merged[name] = value.clone()
            continue
        start = value.double() if merging.method == "task_arithmetic" else torch.zeros_like(value, dtype=torch.float64)
        total = start.clone()
        for share, state in zip(shares, experts, strict=True):
            total += share * (state[name].double() - start)
        merged[name] = total.to(value.dtype)
        if not merged[name].isfinite().all():
            raise FloatingPointError(f"{name} would hold infinities or NaN; smaller weights or another scale")
    return merged
