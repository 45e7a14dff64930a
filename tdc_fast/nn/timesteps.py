"""The timesteps of a call: a number for all samples or one for each, and which group each belongs to."""

from __future__ import annotations

import inspect
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.ops.checks import can_read
from tdc_fast.routing import TimestepGroups

_NAMES = ("timestep", "timesteps", "t")


def one_per_sample(t: Any, x: Tensor) -> Tensor:
    """The timesteps of the batch x (B, ...) as a tensor (B,) on its device, in the dtype they came in.

    Args:
        t: a number, or a tensor of one number or (B,). A float becomes fp32.
        x: the samples.

    Raises:
        ValueError: for anything else.
    """
    batch = x.shape[0]
    if isinstance(t, Real) and not isinstance(t, bool):
        value, dtype = (int(t), torch.int64) if isinstance(t, Integral) else (float(t), torch.float32)
        if not abs(value) < 2**63:
            raise invalid("t", t, "a timestep, a finite number")
        return torch.full((batch,), value, dtype=dtype, device=x.device)
    if not isinstance(t, Tensor):
        raise invalid("t", t, f"a number, or a torch tensor with one timestep for each of the {batch} samples")
    if t.dtype == torch.bool or t.dtype.is_complex or (t.is_floating_point() and t.dtype.itemsize == 1):
        raise invalid("t", t.dtype, "timesteps, integers or floats")
    if tuple(t.shape) not in ((), (1,), (batch,)):
        raise invalid("t", tuple(t.shape), f"one timestep for each of the {batch} samples, or one for all")
    t = t.to(x.device)
    return t if tuple(t.shape) == (batch,) else t.reshape(1).repeat(batch)


def original_index(t: Tensor) -> Tensor:
    """Timesteps (B,) as integers; ValueError for a fraction, which a GPU rounds instead, as a check would wait."""
    if not t.dtype.is_floating_point:
        return t
    index = t.round()
    if can_read(t) and not torch.equal(index, t):
        wrong = t[index != t][0].item()
        raise invalid("t", wrong, "original timesteps, whole numbers (the model rescales them itself), or expert_ids")
    return index.to(torch.int64)


def groups_of(groups: TimestepGroups, t: Tensor) -> Tensor:
    """The group of each timestep (B,), integers or floats that are whole numbers: int64 (B,)."""
    return groups.group_of(original_index(t))


def timestep_argument(model: nn.Module) -> tuple[int, str | None]:
    """Where the model's forward takes timesteps.

    Returns:
        How many arguments stand between x and the timesteps, and their name where that is not 0: the first of
        `timestep`, `timesteps` and `t` that the forward has. Without such a name they are the second argument.
    """
    names = list(inspect.signature(model.forward).parameters)[1:]
    found = next((name for name in _NAMES if name in names), None)
    place = 0 if found is None else names.index(found)
    return place, found if place else None


def other_arguments(model: nn.Module) -> list[str]:
    """The names of the arguments of the model's forward besides x and the timesteps, in order."""
    names = list(inspect.signature(model.forward).parameters)[1:]
    place, _ = timestep_argument(model)
    return names[:place] + names[place + 1 :]
