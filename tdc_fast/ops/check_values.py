"""Validation of what is in tensors.

The numbers in offsets, weight_index and widths are checked on every call when they are in host memory, because native
code indexes with them; on a GPU, reading them would stall the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors
from tdc_fast.ops.checks import is_in_memory, is_seen


def run_or_explain(
    kernel: Callable[..., Any], check: Callable[[Any, Any], None], problem: Any, t: Any, *args: Any
) -> Any:
    """Runs a backend's function. Backends check the numbers that they index with; the error of `check` says more."""
    try:
        return kernel(problem, *args)
    except ValueError:
        check(problem, t)
        raise


def check_conv_values(problem: ConvProblem, t: ConvTensors) -> None:
    """Raises ValueError for numbers out of range in host tensors; does nothing for tensors on a device."""
    if problem.device.type == "cpu":
        _check_routing_values(problem.batch, problem.num_experts, t.offsets, t.weight_index)
        _check_width_values("in_widths", t.in_widths, problem.in_channels)
        _check_width_values("out_widths", t.out_widths, problem.out_channels)


def check_dead_inputs(name: str, widths: Tensor, groups: Tensor, x: Tensor, x2: Tensor | None) -> None:
    """Raises ValueError for a value other than 0 at or past the width of its sample's group; waits for a GPU.

    Args:
        name: What errors call the widths.
        widths: (N,), checked.
        groups: (B,), the group of each sample.
        x: (B, C_1, ...).
        x2: The last channels, (B, C_2, ...), or None.
    """
    live = widths.long()[groups]  # (B,)
    for argument, tensor, first in (("x", x, 0), ("x2", x2, x.shape[1])):
        if tensor is None or tensor.is_meta or not (is_in_memory(tensor) and is_seen(tensor)):
            continue
        dead = torch.arange(first, first + tensor.shape[1], device=tensor.device) >= live[:, None]  # (B, C)
        wrong = dead & (tensor != 0).flatten(2).any(2)  # so is NaN
        if wrong.any():
            sample, channel = (int(index) for index in wrong.nonzero()[0])
            value = tensor[sample, channel].flatten()
            found = f"{float(value[value != 0][0])} in channel {channel} of sample {sample}"
            remedy = f"zeros: its group {int(groups[sample])} has {int(live[sample])} live channels ({name})"
            raise invalid(argument, found, f"{remedy}, and what routed operators write past them is zero")


def check_norm_values(problem: NormProblem, t: NormTensors) -> None:
    """Raises ValueError for numbers out of range in host tensors; does nothing for tensors on a device."""
    if problem.device.type == "cpu":
        _check_routing_values(problem.batch, problem.num_experts, t.offsets, t.weight_index)
        _check_width_values("widths", t.widths, problem.channels, problem.channels_per_group)


def _check_routing_values(batch: int, num_experts: int, offsets: Tensor, weight_index: Tensor) -> None:
    """Raises ValueError unless offsets rise from 0 to B and every expert exists."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != batch or (values != sorted(values)):
        raise invalid("plan", f"offsets {values}", f"the plan of this batch, of {batch} samples")
    experts = weight_index.tolist()
    if min(experts) < 0 or max(experts) >= num_experts:
        bad = next(e for e in experts if not 0 <= e < num_experts)
        raise invalid("weight_index", bad, f"indices in [0, {num_experts}), the experts that weight holds")


def _check_width_values(name: str, widths: Tensor | None, channels: int, step: int = 1) -> None:
    """Raises ValueError unless 0 <= width <= channels and each is a multiple of `step`."""
    if widths is None:
        return
    values = widths.tolist()
    if min(values) < 0 or max(values) > channels:
        bad = next(w for w in values if not 0 <= w <= channels)
        raise invalid(name, bad, f"widths from 0 to the {channels} channels")
    if step > 1:
        for value in values:
            if value % step:
                raise invalid(name, value, f"multiples of the {step} channels per norm group")
