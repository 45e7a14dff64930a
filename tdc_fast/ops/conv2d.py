"""routed_conv2d: the public function and its contract. What it calls is registered in conv2d_operators.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from tdc_fast.errors import integer
from tdc_fast.ops import backends
from tdc_fast.ops.check_values import check_dead_inputs
from tdc_fast.ops.checks import pair, require_backend_name, require_tensors
from tdc_fast.ops.conv2d_operators import forward, forward_problem
from tdc_fast.ops.plan import RoutingPlan, check_plan, is_plan_of

_OPTIONAL = ("bias", "sample_bias", "residual", "x2", "in_widths", "out_widths")


def routed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
    x2: Tensor | None = None,
    upsample: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolves every sample with the weights of its group's expert, in one launch.

    y[b] = conv2d(x[b], weight[e(b)]) + bias[e(b)] + sample_bias[b] + residual[b], where e(b) is plan.weight_index of
    the group of sample b, and samples are sorted by `plan`.

    All floating arguments have the dtype of x: fp32, bf16, fp16 or fp64; sums are in fp32 (fp64 for fp64). Under
    torch.autocast all but fp64 ones are cast, as torch's own convolution does; that includes the residual, so a
    residual stream fused here is in the low precision. Differentiable once, in reverse and in forward mode.

    Channels at or past a group's width are dead. Dead channels of x and x2 must be zero: routed operators write zeros
    there, kernels rely on it to multiply whole blocks without masks, and a plan made with `validate=True` checks it.
    Dead weights must be finite; they need not be zero. Dead outputs are exact zeros, whatever the values of bias,
    sample_bias, residual and weights there. The gradient of the result may have any values in dead channels; gradients
    of everything dead are exact zeros.

    With `x2`, the input is torch.cat([x, x2], dim=1); with `upsample=2`, it is enlarged to twice its height and width
    (nearest upsampling). Kernels read x and x2 directly, and neither tensor is made. A backend without such a kernel
    makes it first, which costs a copy; `explain` says so.

        h = routed_conv2d(x, weight, bias, plan, padding=1, upsample=2)  # (B, C_out, 2 H, 2 W)
        h = routed_conv2d(h, weight_1x1, None, plan, x2=skip)  # weight_1x1 (E, C_out, C_h + C_skip, 1, 1)

    Args:
        x: (B, C_in, H, W), any strides (channels_last is free, others are copied); with x2 (B, C_in - C_2, H, W).
        weight: (E, C_out, C_in, R, S).
        bias: (E, C_out) or None.
        plan: The plan that sorted the batch.
        stride: At least 1; one number or (height, width).
        padding: At least 0; one number or (height, width).
        in_widths: int32 (N,), live input channels of each group, from 0 to all, x and x2 counted together: it
            may end in either. None is all. Only the CPU raises for numbers outside this range.
        out_widths: int32 (N,), live output channels of each group, likewise.
        sample_bias: (B, C_out) or None.
        residual: (B, C_out, OH, OW) or None.
        x2: The last input channels, (B, C_2, H, W), any strides, or None.
        upsample: 1, or 2 for twice the height and width.
        backend: "reference", "cpu", "triton", "cuda" or "hopper"; None picks the fastest that supports the call.

    Returns:
        (B, C_out, OH, OW) in channels_last memory, OH = (upsample H + 2 padding - R) // stride + 1.

    Raises:
        ValueError: Naming argument, value and remedy. Of a plan with `validate=True` also for a dead channel of x or x2
            that is not zero.
    """
    stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
    if type(upsample) is not int:  # calls are found by the types of their settings
        upsample = integer("upsample", upsample, 1, 2)
    result = None
    if not is_compiling() and is_plan_of(plan, x):
        result = forward.find(
            x, weight, bias, sample_bias, residual, x2, plan.offsets, plan.tiles, plan.weight_index, in_widths,
            out_widths, stride, padding, upsample, "" if backend is None else backend,
        )  # fmt: skip
    if result is None:
        require_backend_name(backend)
        arguments = _checked(
            x, weight, bias, plan, stride, padding, in_widths, out_widths, sample_bias, residual, x2, upsample
        )
        result = forward.call_first(*arguments, backend or "")
    if in_widths is not None and plan.validate:
        check_dead_inputs("in_widths", in_widths, plan.groups, x, x2)
    return result


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    x2: Tensor | None,
    upsample: int,
) -> tuple[Any, ...]:
    """The arguments of the registered operator but `backend`; ValueError for one of the wrong type."""
    require_tensors(
        _OPTIONAL,
        x=x,
        weight=weight,
        bias=bias,
        sample_bias=sample_bias,
        residual=residual,
        x2=x2,
        in_widths=in_widths,
        out_widths=out_widths,
    )
    check_plan(x, plan)
    upsample = integer("upsample", upsample, 1, 2)
    routing = (plan.offsets, plan.tiles, plan.weight_index, in_widths, out_widths)
    settings = (pair("stride", stride, 1), pair("padding", padding, 0), upsample)
    return (x, weight, bias, sample_bias, residual, x2, *routing, *settings)


backends.explains(routed_conv2d, lambda **arguments: forward_problem(*_checked(**arguments)))
