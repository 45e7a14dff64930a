"""The `cpu` backend: hands addresses to the native kernels of tdc_fast._native.

fp32 and bf16 in host memory. Shapes have been checked before they come here; the numbers inside offsets, weight_index
and widths are checked by native code before it indexes with them (it raises ValueError).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, NormProblem
from tdc_fast.ops import native
from tdc_fast.ops.checks import check_conv_values, check_norm_values

name = "cpu"
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_NHWC = torch.channels_last


def supports(problem: ConvProblem | NormProblem) -> str | None:
    if native.module is None:
        return native.why_missing
    if problem.device.type != "cpu":
        return f"its tensors live in host memory, not on {problem.device}"
    if problem.dtype not in _DTYPE_CODES:
        return f"it has float32 and bfloat16, not {problem.dtype}"
    if isinstance(problem, ConvProblem):
        if problem.filter[0] % 2 == 0 or problem.filter[1] % 2 == 0:
            return f"it has odd filters, not {problem.filter}"
        if problem.stride[0] > 2 or problem.stride[1] > 2:
            return f"it has strides 1 and 2, not {problem.stride}"
    return None


def routing_plan(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Stable counting sort. Returns order, inverse, offsets and the first sample with a bad group, or -1."""
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=_NHWC)


def _geometry(p: ConvProblem, weight_strides: tuple[int, ...]) -> dict[str, Any]:
    return {
        "dtype": _DTYPE_CODES[p.dtype],
        "batch": p.batch,
        "height": p.height,
        "width": p.width,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "filter_height": p.filter[0],
        "filter_width": p.filter[1],
        "stride_height": p.stride[0],
        "stride_width": p.stride[1],
        "pad_height": p.padding[0],
        "pad_width": p.padding[1],
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
        "weight_strides": weight_strides,
        "threads": torch.get_num_threads(),
    }


def conv2d(
    p: ConvProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    offsets: Tensor,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
) -> Tensor:
    offsets, weight_index = offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    y = torch.empty((p.batch, p.out_channels, p.out_height, p.out_width), dtype=p.dtype, memory_format=_NHWC)
    if p.batch == 0:
        check_conv_values(p, offsets, weight_index, in_widths, out_widths)
        return y
    x, bias, sample_bias = _nhwc(x), _dense(bias), _dense(sample_bias)
    residual = None if residual is None else _nhwc(residual)
    native.module.conv2d_forward(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=_address(bias),
        sample_bias=_address(sample_bias),
        residual=_address(residual),
        y=y.data_ptr(),
        offsets=offsets.data_ptr(),
        weight_index=weight_index.data_ptr(),
        in_widths=_address(in_widths),
        out_widths=_address(out_widths),
        **_geometry(p, weight.stride()),
    )
    return y


def conv2d_dgrad(
    p: ConvProblem,
    dy: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
) -> Tensor:
    offsets, weight_index = offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    dx = torch.empty((p.batch, p.in_channels, p.height, p.width), dtype=p.dtype, memory_format=_NHWC)
    if p.batch == 0:
        check_conv_values(p, offsets, weight_index, in_widths, out_widths)
        return dx
    dy = _nhwc(dy)
    native.module.conv2d_dgrad(
        dy=dy.data_ptr(),
        weight=weight.data_ptr(),
        dx=dx.data_ptr(),
        offsets=offsets.data_ptr(),
        weight_index=weight_index.data_ptr(),
        in_widths=_address(in_widths),
        out_widths=_address(out_widths),
        **_geometry(p, weight.stride()),
    )
    return dx


def conv2d_wgrad(
    p: ConvProblem,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    offsets, weight_index = offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    make = torch.zeros if p.batch == 0 else torch.empty
    dweight = None
    if mask[0]:
        dweight = torch.zeros_like(weight) if p.batch == 0 else torch.empty_like(weight)
    dbias = make((p.num_experts, p.out_channels), dtype=p.dtype) if mask[1] else None
    dsample_bias = make((p.batch, p.out_channels), dtype=p.dtype) if mask[2] else None
    if p.batch == 0:
        check_conv_values(p, offsets, weight_index, in_widths, out_widths)
        return dweight, dbias, dsample_bias
    dy, x = _nhwc(dy), _nhwc(x)
    native.module.conv2d_wgrad(
        x=x.data_ptr(),
        dy=dy.data_ptr(),
        dweight=_address(dweight),
        dbias=_address(dbias),
        dsample_bias=_address(dsample_bias),
        offsets=offsets.data_ptr(),
        weight_index=weight_index.data_ptr(),
        in_widths=_address(in_widths),
        out_widths=_address(out_widths),
        **_geometry(p, weight.stride() if dweight is None else dweight.stride()),
    )
    return dweight, dbias, dsample_bias


def _norm_arguments(
    p: NormProblem, offsets: Tensor, weight_index: Tensor, widths: Tensor | None
) -> tuple[dict[str, Any], tuple[Tensor | None, ...]]:
    """Keyword arguments shared by forward and backward, and the tensors that own the addresses in them."""
    offsets, weight_index, widths = offsets.contiguous(), weight_index.contiguous(), _dense(widths)
    arguments = {
        "offsets": offsets.data_ptr(),
        "weight_index": weight_index.data_ptr(),
        "widths": _address(widths),
        "dtype": _DTYPE_CODES[p.dtype],
        "batch": p.batch,
        "height": p.height,
        "width": p.width,
        "channels": p.channels,
        "num_norm_groups": p.num_norm_groups,
        "eps": p.eps,
        "silu": p.silu,
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
        "threads": torch.get_num_threads(),
    }
    return arguments, (offsets, weight_index, widths)


def group_norm(
    p: NormProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments, owners = _norm_arguments(p, offsets, weight_index, widths)
    y = torch.empty((p.batch, p.channels, p.height, p.width), dtype=p.dtype, memory_format=_NHWC)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32)
    rstd = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32)
    if p.batch == 0:
        check_norm_values(p, offsets, weight_index, widths)
        return y, mean, rstd
    x, weight, bias = _nhwc(x), weight.contiguous(), bias.contiguous()
    scale, shift = _dense(scale), _dense(shift)
    native.module.group_norm_forward(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        scale=_address(scale),
        shift=_address(shift),
        y=y.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        **arguments,
    )
    del owners
    return y, mean, rstd


def group_norm_backward(
    p: NormProblem,
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
    mask: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    arguments, owners = _norm_arguments(p, offsets, weight_index, widths)
    shapes = ((p.num_experts, p.channels),) * 2 + ((p.batch, p.channels),) * 2
    make = torch.zeros if p.batch == 0 else torch.empty
    small = [make(s, dtype=p.dtype) if wanted else None for s, wanted in zip(shapes, mask[1:], strict=True)]
    dweight, dbias, dscale, dshift = small
    dx = None
    if mask[0]:
        dx = torch.empty((p.batch, p.channels, p.height, p.width), dtype=p.dtype, memory_format=_NHWC)
    if p.batch == 0:
        check_norm_values(p, offsets, weight_index, widths)
        return dx, dweight, dbias, dscale, dshift
    dy, x, weight, bias = _nhwc(dy), _nhwc(x), weight.contiguous(), bias.contiguous()
    scale, shift, mean, rstd = _dense(scale), _dense(shift), mean.contiguous(), rstd.contiguous()
    native.module.group_norm_backward(
        dy=dy.data_ptr(),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        scale=_address(scale),
        shift=_address(shift),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=_address(dx),
        dweight=_address(dweight),
        dbias=_address(dbias),
        dscale=_address(dscale),
        dshift=_address(dshift),
        **arguments,
    )
    del owners
    return dx, dweight, dbias, dscale, dshift
