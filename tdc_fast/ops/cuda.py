"""The `cuda` backend: asks the native planners for launches and hands them to what runs kernels on the device.

Convolutions in bf16, fp16 and tf32, group norms, the routing plan. Shapes have been checked before they come here; the
numbers inside offsets, tiles, weight_index and widths live on the device, where the kernels clamp them. Nothing here
waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, NormProblem
from tdc_fast.kernels.tile_table import tiles_of, total_rows
from tdc_fast.ops import native
from tdc_fast.ops.cuda_launch import device_facts, launch, launcher_for, serves
from tdc_fast.ops.layout import (
    aligned,
    channel_innermost,
    empty_channel_innermost,
    is_channel_innermost,
    nhwc,
)

name = "cuda"
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def supports(problem: ConvProblem | NormProblem) -> str | None:
    if not serves(problem.device):
        return f"its tensors live on a CUDA device, not on {problem.device}"
    if problem.dtype not in _DTYPE_CODES:
        return f"it has float32, bfloat16 and float16, not {problem.dtype}"
    if isinstance(problem, ConvProblem):
        if problem.dtype == torch.float32 and not problem.tf32:
            return (
                "its float32 convolution rounds products to tf32, which "
                'torch.set_float32_matmul_precision("high") would allow'
            )
        if problem.filter[0] % 2 == 0 or problem.filter[1] % 2 == 0:
            return f"it has odd filters, not {problem.filter}"
        if problem.stride[0] > 2 or problem.stride[1] > 2:
            return f"it has strides 1 and 2, not {problem.stride}"
    launcher, reason = launcher_for(problem.device)
    if launcher is None:
        return reason
    if isinstance(problem, NormProblem):
        backward = problem.op == "routed_group_norm_backward"
        core = native.module
        refuse = core.cuda_group_norm_backward_refusal if backward else core.cuda_group_norm_forward_refusal
        return refuse(**_norm_sizes(problem), device=launcher.device_facts(problem.device)) or None
    return None


def _run(planner: Any, device: torch.device, arguments: dict[str, Any]) -> None:
    launch(planner(**arguments, device=device_facts(device)), device)


def _workspace(measure: Any, device: torch.device, arguments: dict[str, Any]) -> Tensor | None:
    """Scratch memory that the launches of these arguments want; None for none."""
    size = measure(**arguments, device=device_facts(device))
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else aligned(tensor.contiguous())


def _image(tensor: Tensor) -> Tensor:
    return aligned(nhwc(tensor))


def _empty_image(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def routing_plan(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """(order, inverse, offsets, sorted groups, tiles) in one launch, or None where no kernel can do that.

    groups: int64 (B,). An id out of range stops the kernel; it shows at the next call that waits for the device.
    """
    launcher, _ = launcher_for(groups.device)
    if launcher is None:
        return None
    facts = launcher.device_facts(groups.device)
    if not native.module.cuda_routing_plan_supported(num_groups=num_groups, device=facts):
        return None
    groups = groups.contiguous()
    batch = groups.shape[0]
    order, inverse, ordered = (torch.empty_like(groups) for _ in range(3))
    offsets = groups.new_empty(num_groups + 1, dtype=torch.int32)
    tiles = groups.new_empty((total_rows(batch, num_groups), 3), dtype=torch.int32)
    arguments = {
        "groups": groups.data_ptr(),
        "order": order.data_ptr(),
        "inverse": inverse.data_ptr(),
        "sorted_groups": ordered.data_ptr(),
        "offsets": offsets.data_ptr(),
        "tiles": tiles.data_ptr(),
        "batch": batch,
        "num_groups": num_groups,
    }
    _run(native.module.cuda_launches_routing_plan, groups.device, arguments)
    return order, inverse, offsets, ordered, tiles


def _geometry(p: ConvProblem) -> dict[str, Any]:
    return {
        "dtype": _DTYPE_CODES[p.dtype],
        "tf32": p.tf32,
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
    y = _empty_image(x, p.batch, p.out_channels, p.out_height, p.out_width)
    if p.batch == 0:
        return y
    x, weight, bias, sample_bias = _image(x), aligned(channel_innermost(weight)), _dense(bias), _dense(sample_bias)
    residual = None if residual is None else _image(residual)
    offsets, weight_index = offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    tiles = tiles_of(tiles, offsets, p.batch).contiguous()
    arguments = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": _address(bias),
        "sample_bias": _address(sample_bias),
        "residual": _address(residual),
        "y": y.data_ptr(),
        "offsets": offsets.data_ptr(),
        "tiles": tiles.data_ptr(),
        "weight_index": weight_index.data_ptr(),
        "in_widths": _address(in_widths),
        "out_widths": _address(out_widths),
        **_geometry(p),
    }
    _run(native.module.cuda_launches_conv_forward, x.device, arguments)
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
    dx = _empty_image(dy, p.batch, p.in_channels, p.height, p.width)
    if p.batch == 0:
        return dx
    dy, weight = _image(dy), aligned(channel_innermost(weight))
    offsets, weight_index = offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    tiles = tiles_of(tiles, offsets, p.batch).contiguous()
    arguments = {
        "dy": dy.data_ptr(),
        "weight": weight.data_ptr(),
        "dx": dx.data_ptr(),
        "offsets": offsets.data_ptr(),
        "tiles": tiles.data_ptr(),
        "weight_index": weight_index.data_ptr(),
        "in_widths": _address(in_widths),
        "out_widths": _address(out_widths),
        **_geometry(p),
    }
    _run(native.module.cuda_launches_conv_dgrad, dy.device, arguments)
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
    """Where weight is not channel-innermost, dweight is written so and copied into the strides of weight."""
    make = torch.zeros if p.batch == 0 else torch.empty
    dweight = None
    if mask[0]:
        dweight = torch.zeros_like(weight) if p.batch == 0 else torch.empty_like(weight)
    dbias = make((p.num_experts, p.out_channels), dtype=p.dtype, device=dy.device) if mask[1] else None
    dsample_bias = make((p.batch, p.out_channels), dtype=p.dtype, device=dy.device) if mask[2] else None
    if p.batch == 0:
        return dweight, dbias, dsample_bias
    written = dweight
    if dweight is not None and not is_channel_innermost(dweight):
        written = empty_channel_innermost(dweight.shape, dweight.dtype, dweight.device)
    dy, x = _image(dy), _image(x)
    offsets, weight_index = offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    arguments = {
        "x": x.data_ptr(),
        "dy": dy.data_ptr(),
        "dweight": _address(written),
        "dbias": _address(dbias),
        "dsample_bias": _address(dsample_bias),
        "workspace": 0,
        "offsets": offsets.data_ptr(),
        "weight_index": weight_index.data_ptr(),
        "in_widths": _address(in_widths),
        "out_widths": _address(out_widths),
        **_geometry(p),
    }
    workspace = _workspace(native.module.cuda_conv_wgrad_workspace, dy.device, arguments)
    _run(native.module.cuda_launches_conv_wgrad, dy.device, arguments | {"workspace": _address(workspace)})
    if dweight is not None and written is not None and written is not dweight:
        dweight.copy_(written)
    return dweight, dbias, dsample_bias


def _norm_sizes(p: NormProblem) -> dict[str, Any]:
    return {
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
    }


def _norm_arguments(
    p: NormProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
) -> tuple[dict[str, Any], tuple[Tensor | None, ...]]:
    """Keyword arguments shared by forward and backward, and the tensors that own the addresses in them."""
    x, weight, bias, scale, shift = _image(x), weight.contiguous(), bias.contiguous(), _rows(scale), _rows(shift)
    offsets, weight_index, widths = offsets.contiguous(), weight_index.contiguous(), _dense(widths)
    arguments = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
        "scale": _address(scale),
        "shift": _address(shift),
        "scale_stride": 0 if scale is None else scale.stride(0),
        "shift_stride": 0 if shift is None else shift.stride(0),
        "offsets": offsets.data_ptr(),
        "weight_index": weight_index.data_ptr(),
        "widths": _address(widths),
        "workspace": 0,
        **_norm_sizes(p),
    }
    return arguments, (x, weight, bias, scale, shift, offsets, weight_index, widths)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(B, C) whose rows are dense: scale and shift are mostly the halves of one (B, 2 C), which need no copy."""
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


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
    y = _empty_image(x, p.batch, p.channels, p.height, p.width)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if p.batch == 0:
        return y, mean, rstd
    arguments, owners = _norm_arguments(p, x, weight, bias, scale, shift, offsets, weight_index, widths)
    arguments |= {"y": y.data_ptr(), "mean": mean.data_ptr(), "rstd": rstd.data_ptr()}
    workspace = _workspace(native.module.cuda_group_norm_forward_workspace, x.device, arguments)
    planner = native.module.cuda_launches_group_norm_forward
    _run(planner, x.device, arguments | {"workspace": _address(workspace)})
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
    shapes = ((p.num_experts, p.channels),) * 2 + ((p.batch, p.channels),) * 2
    make = torch.zeros if p.batch == 0 else torch.empty
    dweight, dbias, dscale, dshift = (
        make(shape, dtype=p.dtype, device=dy.device) if wanted else None
        for shape, wanted in zip(shapes, mask[1:], strict=True)
    )
    dx = _empty_image(dy, p.batch, p.channels, p.height, p.width) if mask[0] else None
    if p.batch == 0:
        return dx, dweight, dbias, dscale, dshift
    arguments, owners = _norm_arguments(p, x, weight, bias, scale, shift, offsets, weight_index, widths)
    dy, mean, rstd = _image(dy), mean.contiguous(), rstd.contiguous()
    arguments |= {
        "dy": dy.data_ptr(),
        "mean": mean.data_ptr(),
        "rstd": rstd.data_ptr(),
        "dx": _address(dx),
        "dweight": _address(dweight),
        "dbias": _address(dbias),
        "dscale": _address(dscale),
        "dshift": _address(dshift),
    }
    workspace = _workspace(native.module.cuda_group_norm_backward_workspace, dy.device, arguments)
    planner = native.module.cuda_launches_group_norm_backward
    _run(planner, dy.device, arguments | {"workspace": _address(workspace)})
    del owners
    return dx, dweight, dbias, dscale, dshift
