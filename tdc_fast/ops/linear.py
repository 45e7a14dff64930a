"""routed_linear: the public function and its contract. What it calls is registered in linear_operators.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from tdc_fast.ops import backends
from tdc_fast.ops.check_values import check_dead_inputs
from tdc_fast.ops.checks import require_backend_name, require_tensors
from tdc_fast.ops.linear_operators import forward, forward_problem, image_of
from tdc_fast.ops.plan import RoutingPlan, check_plan, is_plan_of


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    *,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Applies to every sample the linear layer of its group's expert, in one launch.

    dtypes, autocast, dead channels and gradients are as in `routed_conv2d`.

    Args:
        x: (B, C_in) or (B, T, C_in); B and T may be 0.
        weight: (E, C_out, C_in).
        bias: (E, C_out) or None.
        plan: The plan that sorted the batch.
        in_widths: int32 (N,), live input channels of each group; None is all.
        out_widths: int32 (N,), live output channels of each group; None is all.
        residual: Shape of the result, or None.
        backend: "reference", "cpu", "triton", "cuda" or "hopper"; None picks the fastest that supports the call.

    Returns:
        (B, C_out) or (B, T, C_out), contiguous.

    Raises:
        ValueError: Naming argument, value and remedy.
    """
    result = None
    if not is_compiling() and is_plan_of(plan, x):
        result = forward.find(
            x, weight, bias, residual, plan.offsets, plan.tiles, plan.weight_index, in_widths, out_widths,
            "" if backend is None else backend,
        )  # fmt: skip
    if result is None:
        require_backend_name(backend)
        result = forward.call_first(*_checked(x, weight, bias, plan, in_widths, out_widths, residual), backend or "")
    if in_widths is not None and plan.validate:
        check_dead_inputs("in_widths", in_widths, plan.groups, image_of("x", x), None)
    return result


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    residual: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the registered operator but `backend`; ValueError for one of the wrong type."""
    optional = {"bias": bias, "in_widths": in_widths, "out_widths": out_widths, "residual": residual}
    require_tensors(tuple(optional), x=x, weight=weight, **optional)
    check_plan(x, plan)
    return x, weight, bias, residual, plan.offsets, plan.tiles, plan.weight_index, in_widths, out_widths


backends.explains(routed_linear, lambda **arguments: forward_problem(*_checked(**arguments)))
