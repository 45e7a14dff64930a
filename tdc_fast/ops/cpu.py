"""The `cpu` backend: passes addresses to the native kernels of tdc_fast._native.

What it does before that follows from the metadata of the tensors, so a call like an earlier one skips it (replay.py).

fp32 and bf16 in host memory. The caller has checked shapes; native code checks the numbers in offsets, weight_index and
widths before it indexes with them, and raises ValueError.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.ops import native
from tdc_fast.ops.check_values import check_conv_values, check_norm_values
from tdc_fast.ops.layout import dense, empty_nhwc, empty_norm_gradients, empty_wgrad, nhwc
from tdc_fast.ops.native_call import NativeCall

name = "cpu"
fuses = ("x2", "upsample")
only_launches = True
_DTYPES = (torch.float32, torch.bfloat16)
_NORM_GRADS = ("dx", "dweight", "dbias", "dscale", "dshift", "dx2")


def supports(problem: Problem) -> str | None:
    """None where the backend serves the problem, else the reason why not."""
    if native.module is None:
        return native.why_missing
    if problem.device.type != "cpu":
        return f"its tensors live in host memory, not on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"it has float32 and bfloat16, not {problem.dtype}"
    return problem.refusal() if isinstance(problem, ConvProblem) else None


def routing_plan(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Stable counting sort.

    Returns:
        order (B,), inverse (B,), offsets (N + 1,), and the first sample whose group is out of range, or -1.
    """
    groups = groups.contiguous()
    batch = groups.shape[0]
    order = torch.empty(batch, dtype=torch.int64)
    inverse = torch.empty(batch, dtype=torch.int64)
    offsets = torch.empty(num_groups + 1, dtype=torch.int32)
    bad = native.module.routing_plan(
        groups=groups.data_ptr(),
        order=order.data_ptr(),
        inverse=inverse.data_ptr(),
        offsets=offsets.data_ptr(),
        batch=batch,
        num_groups=num_groups,
    )
    return order, inverse, offsets, bad


def _call(method: str, p: ConvProblem, t: ConvTensors, strides: tuple[int, ...], **operands: Tensor | None) -> None:
    """Calls the native convolution.

    Args:
        method: "forward", "dgrad" or "wgrad".
        p: The problem.
        t: Its tensors, dense.
        strides: Of the weight, or of its gradient.
        **operands: What the method takes besides the routing, in its order.
    """
    fused = {"x2_channels": p.x2_channels, "upsample": p.upsample}
    function = getattr(native.module.Conv2d(**native.conv_sizes(p), **fused, weight_strides=strides), method)
    routing: dict[str, Tensor | None] = {"offsets": t.offsets, "weight_index": t.weight_index}
    routing |= {"in_widths": t.in_widths, "out_widths": t.out_widths}
    NativeCall(function, operands | routing, t, partial(check_conv_values, p)).run()


def conv2d(p: ConvProblem, t: ConvTensors) -> Tensor:
    """Returns y (B, C_out, OH, OW), channels_last."""
    y = empty_nhwc(t.x, p.batch, p.out_channels, p.out_height, p.out_width)
    if p.batch == 0:
        check_conv_values(p, t)
        return y
    t = dense(t)
    operands = {"x": t.x, "x2": t.x2, "weight": t.weight, "bias": t.bias, "sample_bias": t.sample_bias}
    _call("forward", p, t, t.weight.stride(), **operands, residual=t.residual, y=y)
    return y


def conv2d_dgrad(p: ConvProblem, dy: Tensor, t: ConvTensors) -> tuple[Tensor, Tensor | None]:
    """Returns dx (B, C_in - C_2, H, W) and dx2 (B, C_2, H, W) or None, channels_last."""
    dx = empty_nhwc(dy, p.batch, p.in_channels - p.x2_channels, p.height, p.width)
    dx2 = empty_nhwc(dy, p.batch, p.x2_channels, p.height, p.width) if p.x2_channels else None
    if p.batch == 0:
        check_conv_values(p, t)
        return dx, dx2
    dy, t = nhwc(dy), dense(t)
    _call("dgrad", p, t, t.weight.stride(), dy=dy, weight=t.weight, dx=dx, dx2=dx2)
    return dx, dx2


def conv2d_wgrad(
    p: ConvProblem, dy: Tensor, t: ConvTensors, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dweight in the strides of weight, dbias (E, C_out), dsample_bias (B, C_out); None where unmasked."""
    dweight, dbias, dsample_bias = empty_wgrad(p, t.weight, mask)
    if p.batch == 0:
        check_conv_values(p, t)
        return dweight, dbias, dsample_bias
    dy, t = nhwc(dy), dense(t)
    strides = t.weight.stride() if dweight is None else dweight.stride()
    operands = {"x": t.x, "x2": t.x2, "dy": dy, "dweight": dweight, "dbias": dbias, "dsample_bias": dsample_bias}
    _call("wgrad", p, t, strides, **operands)
    return dweight, dbias, dsample_bias


def _norm_call(method: str, p: NormProblem, t: NormTensors, operands: dict[str, Tensor | None]) -> None:
    """Calls the native group norm.

    Args:
        method: "forward" or "backward".
        p: The problem.
        t: Its tensors, dense.
        operands: What the method takes besides the routing, in its order.
    """
    norm = native.module.GroupNorm(**native.norm_sizes(p), x2_channels=p.x2_channels)
    routing = {"offsets": t.offsets, "weight_index": t.weight_index, "widths": t.widths}
    NativeCall(getattr(norm, method), operands | routing, t, partial(check_norm_values, p)).run()


def _norm_inputs(t: NormTensors) -> dict[str, Tensor | None]:
    return {"x": t.x, "x2": t.x2, "weight": t.weight, "bias": t.bias, "scale": t.scale, "shift": t.shift}


def group_norm(p: NormProblem, t: NormTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y (B, C, H, W), channels_last; mean and rstd (B, norm groups) fp32; counters."""
    y = empty_nhwc(t.x, p.batch, p.channels, p.height, p.width)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32)
    rstd = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32)
    counters = torch.empty((p.num_experts, p.num_norm_groups), dtype=torch.int32)
    if p.batch == 0:
        check_norm_values(p, t)
        return y, mean, rstd, counters.zero_()
    t = dense(t)
    _norm_call("forward", p, t, _norm_inputs(t) | {"y": y, "mean": mean, "rstd": rstd, "counters": counters})
    return y, mean, rstd, counters


def group_norm_backward(
    p: NormProblem,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    t: NormTensors,
    mask: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias, scale, shift and x2, in their shapes; None where unmasked."""
    grads = empty_norm_gradients(p, dy, mask)
    if p.batch == 0:
        check_norm_values(p, t)
        return grads
    dy, mean, rstd, t = nhwc(dy), mean.contiguous(), rstd.contiguous(), dense(t)
    operands = {"dy": dy, **_norm_inputs(t), "mean": mean, "rstd": rstd}
    _norm_call("backward", p, t, operands | dict(zip(_NORM_GRADS, grads, strict=True)))
    return grads
