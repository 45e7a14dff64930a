"""routed_group_norm: contract, registration, gradient.

Registered operators: tdc_fast::routed_group_norm, tdc_fast::routed_group_norm_backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.kernels.problems import NormProblem
from tdc_fast.ops import backends, library
from tdc_fast.ops.checks import (
    accumulate_dtype,
    check_norm_values,
    norm_problem,
    require_backend_name,
    require_integer,
    require_tensors,
    signature,
)
from tdc_fast.ops.plan import RoutingPlan, check_plan


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
    backend: str | None = None,
) -> Tensor:
    """Group norm with the affine of every sample's expert, then the sample's own scale and shift, then SiLU.

    y[b] = act((norm(x[b]) * weight[e(b)] + bias[e(b)]) * (1 + scale[b]) + shift[b]); samples are sorted by `plan`.

    x: (B, C, H, W), any strides. weight, bias: (E, C). scale, shift: (B, C). All of the dtype of x;
        statistics are in fp32 (fp64 for fp64), per sample over C // num_groups channels.
    num_groups: norm groups of the full width; must divide C.
    widths: int32 (N,), live channels per routing group, multiples of C // num_groups, so that the statistics
        of what is kept do not change. Dead channels are not read, come out as exact zeros, and have
        gradients of exact zero.
    activation: None or "silu".
    Returns (B, C, H, W) in channels_last memory.

    Under torch.autocast the dtype of x stays as it is and the other arguments follow it: the statistics are in fp32
    anyway, and what comes next casts back to the low precision. Differentiable once. Raises ValueError naming argument,
    value and remedy.
    """
    _check_kinds(x, weight, bias, plan, num_groups, eps, widths, scale, shift)
    require_backend_name(backend)
    y, _, _ = _forward_op(
        x,
        weight,
        bias,
        scale,
        shift,
        plan.offsets,
        plan.weight_index,
        widths,
        num_groups,
        eps,
        _is_silu(activation),
        backend or "",
    )
    return y


def _check_kinds(
    x: Any, weight: Any, bias: Any, plan: Any, num_groups: Any, eps: Any, widths: Any, scale: Any, shift: Any
) -> None:
    """ValueError for an argument of another type than it should have."""
    check_plan(x, plan)
    require_tensors(("widths", "scale", "shift"), weight=weight, bias=bias, widths=widths, scale=scale, shift=shift)
    require_integer("num_groups", num_groups)
    if not isinstance(eps, (float, int)):
        raise invalid("eps", eps, "a positive number")


def _is_silu(activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise invalid("activation", activation, 'None or "silu"')
    return activation == "silu"


@backends.describes("routed_group_norm")
def _describe(
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
) -> NormProblem:
    _check_kinds(x, weight, bias, plan, num_groups, eps, widths, scale, shift)
    tensors = (x, weight, bias, scale, shift, plan.offsets, plan.weight_index, widths)
    problem = norm_problem("routed_group_norm", *tensors, num_groups, eps, _is_silu(activation))
    check_norm_values(problem, plan.offsets, plan.weight_index, widths)
    return problem


_SETTINGS_SCHEMA = "int num_groups, float eps, bool silu"


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x, weight, bias, scale, shift, offsets, weight_index, widths)

    def describe() -> NormProblem:
        return norm_problem("routed_group_norm", *tensors, num_groups, eps, silu)

    key = ("group_norm", num_groups, eps, silu, signature(*tensors))
    problem, chosen = backends.remembered(key, describe, backend)
    try:
        return chosen.group_norm(problem, *tensors)
    except ValueError:  # backends check the numbers that they index with; ours says more
        check_norm_values(problem, offsets, weight_index, widths)
        raise


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x, weight, bias, scale, shift, offsets, weight_index, widths)
    p = norm_problem("routed_group_norm", *tensors, num_groups, eps, silu)
    statistics = (p.batch, p.num_norm_groups)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    acc = accumulate_dtype(x.dtype)
    return y, x.new_empty(statistics, dtype=acc), x.new_empty(statistics, dtype=acc)


_forward_op = library.define(
    "routed_group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor offsets, "
    f"Tensor weight_index, Tensor? widths, {_SETTINGS_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    tensors = (x, weight, bias, scale, shift, offsets, weight_index, widths)
    settings = (num_groups, eps, silu)

    def describe() -> NormProblem:
        return norm_problem("routed_group_norm_backward", *tensors, *settings, dy=dy, mean=mean, rstd=rstd)

    key = ("group_norm_backward", settings, signature(dy, mean, rstd, *tensors))
    problem, chosen = backends.remembered(key, describe, backend)
    try:
        grads = chosen.group_norm_backward(
            problem, dy, x, weight, bias, scale, shift, mean, rstd, offsets, weight_index, widths, tuple(mask)
        )
    except ValueError:
        check_norm_values(problem, offsets, weight_index, widths)
        raise
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    shapes = (weight.shape, weight.shape, x.shape[:2], x.shape[:2])
    rest = (dy.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, mask[1:], strict=True))
    return (dx if mask[0] else dy.new_empty(0), *rest)


# Gradients that `mask` does not ask for come back as empty tensors: a schema has no optional results.
_backward_op = library.define(
    "routed_group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    f"Tensor mean, Tensor rstd, Tensor offsets, Tensor weight_index, Tensor? widths, {_SETTINGS_SCHEMA}, "
    "bool[5] mask, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _RoutedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        offsets: Tensor,
        weight_index: Tensor,
        widths: Tensor | None,
        num_groups: int,
        eps: float,
        silu: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with library.below_autograd():
            y, mean, rstd = run(
                x, weight, bias, scale, shift, offsets, weight_index, widths, num_groups, eps, silu, backend
            )
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd, offsets, weight_index, widths)
        ctx.settings, ctx.backend = (num_groups, eps, silu), backend
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 13
        mask = ctx.needs_input_grad[1:6]
        grads = library.call_in_backward(_backward_op, dy, *ctx.saved_tensors, *ctx.settings, mask, ctx.backend)
        wanted = (grad if needed else None for grad, needed in zip(grads, mask, strict=True))
        return (None, *wanted, *(None,) * 7)


def _cast(device_type: str, x: Tensor, *args: Any) -> tuple[Any, ...]:
    low = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return x, *(arg.to(x.dtype) if low and isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


library.add_autograd(_forward_op, _RoutedGroupNorm)
library.add_autocast(_forward_op, _cast)
