"""The files of a checkpoint beside its weights, the optimizer's and the training state, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.runs.weights import check_like, load_verified

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, besides its number of steps."""
_REST = {"step", "random", "data", "sampler", "means", "samples_per_group", "wall_seconds"}


@dataclass(frozen=True)
class StoredState:
    """The content of a checkpoint.

    Attributes:
        model: state dict of the raw weights.
        averages: state dict of the averaged weights, by rate.
        moments: AdamW's state, by number of the parameter.
        rest: what an exact continuation needs besides, or None.
    """

    model: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    moments: dict[int, dict[str, Any]]
    rest: Mapping[str, Any] | None


def read_moments(path: Path, parameters: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Read AdamW's state from the optimizer's file of a checkpoint, improved-diffusion's included.

    Args:
        path: the file.
        parameters: the model's parameters by name, in the optimizer's order.

    Raises:
        ValueError: the file is damaged, or is not the state of these parameters; names it.
    """
    content = load_verified(path)
    state = content.get("state") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise invalid("checkpoint", str(path), "an optimizer's state dict")
    state = _by_parameter(path, state, parameters)
    if set(state) != set(range(len(parameters))):
        raise invalid("checkpoint", str(path), f"the state of the model's {len(parameters)} parameters; it has others")
    for (name, parameter), number in zip(parameters.items(), range(len(parameters)), strict=True):
        entry = state[number]
        if not isinstance(entry, Mapping) or set(entry) != {"step", *MOMENTS}:
            raise invalid("checkpoint", str(path), f"step, {' and '.join(MOMENTS)} of {name}, as AdamW keeps them")
        for moment in MOMENTS:
            check_like("checkpoint", path, f"{moment} of {name}", entry[moment], parameter)
        if bool((entry["exp_avg_sq"] < 0).any()):
            raise invalid("checkpoint", str(path), f"squares in exp_avg_sq of {name}; some are negative")
        _check_step(path, name, entry["step"])
    return {number: dict(entry) for number, entry in state.items()}


def _by_parameter(path: Path, state: Mapping[Any, Any], parameters: Mapping[str, Tensor]) -> Mapping[Any, Any]:
    """AdamW's state by number of the parameter, where improved-diffusion's --use_fp16 True has all in one tensor."""
    flat = state.get(0)
    if len(state) != 1 or len(parameters) == 1 or not isinstance(flat, Mapping):
        return state
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = {}
    for moment in MOMENTS:
        check_like("checkpoint", path, f"{moment} of all", flat.get(moment), torch.empty(1).expand(sum(sizes)))
        parts[moment] = flat[moment].split(sizes)
    return {
        number: {**flat, **{moment: parts[moment][number].view(parameter.shape) for moment in MOMENTS}}
        for number, parameter in enumerate(parameters.values())
    }


def _check_step(path: Path, name: str, step: object) -> None:
    value = step.item() if isinstance(step, Tensor) and step.shape == () and not step.is_meta else step
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise invalid("checkpoint", str(path), f"a number of steps of {name}")


def read_rest(path: Path, step: int, samples_per_group: Tensor, means: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Read the training state of a checkpoint.

    Args:
        path: the file.
        step: step of the checkpoint.
        samples_per_group: the loop's own counts, for their shape and dtype.
        means: the loop's own `counts` and `norms` of the log, for theirs.

    Raises:
        ValueError: the file is damaged, or is not the state of this step; names it.
    """
    rest = load_verified(path)
    if not isinstance(rest, Mapping) or not set(rest) >= _REST or rest["step"] != step:
        raise invalid("checkpoint", str(path), f"the training state of step {step}: {', '.join(sorted(_REST))}")
    check_like("checkpoint", path, "samples_per_group", rest["samples_per_group"], samples_per_group)
    stored = rest["means"]
    if not isinstance(stored, Mapping) or not isinstance(stored.get("sums"), Mapping):
        raise invalid("checkpoint", str(path), "the running means of the log")
    for name, value in stored["sums"].items():
        check_like("checkpoint", path, f"sums of {name}", value, means["counts"])
    for name, own in means.items():
        check_like("checkpoint", path, name, stored.get(name), own)
    return rest
