"""routed_group_norm: the public function and its contract. What it calls is registered in group_norm_operators.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from tdc_fast.errors import integer, invalid
from tdc_fast.ops import backends
from tdc_fast.ops.check_values import check_dead_inputs
from tdc_fast.ops.checks import require_backend_name, require_tensors
from tdc_fast.ops.group_norm_operators import forward, forward_problem
from tdc_fast.ops.plan import RoutingPlan, check_plan, is_plan_of


def routed_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    plan: RoutingPlan,
    *,
    num_groups: int,
    eps: float = 1e-5,
    widths: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    x2: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Group norm with the affine of each sample's expert, then the sample's own scale and shift, then SiLU.

    y[b] = act((norm(x[b]) * weight[e(b)] + bias[e(b)]) * (1 + scale[b]) + shift[b]); samples are sorted by `plan`.

    All floating arguments have the dtype of x: fp32, bf16, fp16 or fp64. Statistics are in fp32 (fp64 for fp64), per
    sample over C // num_groups channels. Under torch.autocast the dtype of x stays as it is and the other arguments
    follow it: the statistics are in fp32 anyway, and the next layer casts back to the low precision. Differentiable
    once, in reverse and in forward mode.

    With `x2`, the input is torch.cat([x, x2], dim=1), which is not made: kernels read x and x2 directly, and a norm
    group may have channels of both. A backend without such a kernel makes it first, which costs a copy; `explain` says
    so.

    Args:
        x: (B, C, H, W), any strides; with x2 (B, C - C_2, H, W).
        weight: (E, C).
        bias: (E, C).
        plan: The plan that sorted the batch.
        num_groups: Norm groups of the full width; must divide C.
        eps: Added to the variance.
        widths: int32 (N,), live channels of each routing group, multiples of C // num_groups, so that the statistics of
            the norm groups that are kept do not change; None is all. Dead channels of x and x2 must be zeros (so
            finite), as in `routed_conv2d`; their results and gradients are exact zeros, whatever weight, bias, scale,
            shift and the gradient of the result hold there.
        scale: (B, C) or None.
        shift: (B, C) or None.
        activation: None or "silu".
        x2: The last channels of the input, (B, C_2, H, W), any strides, or None.
        backend: "reference", "cpu", "triton", "cuda" or "hopper"; None picks the fastest that supports the call.

    Returns:
        (B, C, H, W) in channels_last memory.

    Raises:
        ValueError: Naming argument, value and remedy. Of a plan with `validate=True` also for a dead channel of x or x2
            that is not zero.
    """
    if type(num_groups) is not int:  # calls are found by the types of their settings
        num_groups = integer("num_groups", num_groups)
    result = None
    known = activation is None or (isinstance(activation, str) and activation == "silu")
    if known and not is_compiling() and is_plan_of(plan, x):
        result = forward.find(
            x, weight, bias, scale, shift, x2, plan.offsets, plan.weight_index, widths, num_groups, eps,
            activation == "silu", "" if backend is None else backend,
        )  # fmt: skip
    if result is None:
        require_backend_name(backend)
        arguments = _checked(x, weight, bias, plan, num_groups, eps, widths, scale, shift, activation, x2)
        result = forward.call_first(*arguments, backend or "")
    if widths is not None and plan.validate:
        check_dead_inputs("widths", widths, plan.groups, x, x2)
    return result[0]


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    plan: RoutingPlan,
    num_groups: int,
    eps: float,
    widths: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    x2: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the registered operator, in its order; ValueError for one of the wrong type."""
    optional = ("widths", "scale", "shift", "x2")
    require_tensors(optional, x=x, weight=weight, bias=bias, widths=widths, scale=scale, shift=shift, x2=x2)
    check_plan(x, plan)
    num_groups = integer("num_groups", num_groups)
    if not isinstance(eps, (float, int)):
        raise invalid("eps", eps, "a positive number")
    if activation is not None and not (isinstance(activation, str) and activation == "silu"):
        raise invalid("activation", activation, 'None or "silu"')
    routing = (plan.offsets, plan.weight_index, widths)
    return (x, weight, bias, scale, shift, x2, *routing, num_groups, eps, activation == "silu")


backends.explains(routed_group_norm, lambda **arguments: forward_problem(*_checked(**arguments)))
