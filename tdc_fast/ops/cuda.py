"""The `cuda` backend: asks the native planners for launches and passes them to the launcher of the device.

Convolutions in bf16, fp16 and tf32, group norms, the routing plan. The caller has checked shapes; the numbers in
offsets, tiles, weight_index and widths stay on the device, where kernels clamp them. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.kernels.tile_table import tiles_of, total_rows
from tdc_fast.ops import native
from tdc_fast.ops.cuda_device import Facts
from tdc_fast.ops.cuda_launch import launch_planned, launcher_facts, launcher_for, serves
from tdc_fast.ops.layout import (
    aligned,
    channel_innermost,
    dense,
    empty_channel_innermost,
    empty_nhwc,
    empty_norm_gradients,
    empty_wgrad,
    is_channel_innermost,
    nhwc,
)
from tdc_fast.ops.native import address, addresses

name = "cuda"
only_launches = True
fuses = ("x2", "upsample")  # of what a call may fuse into reading its input
_IF_GIVEN = ("x2", "counters")  # what planners take only where it is given
FEW_CHANNELS = "in the form of few channels"  # what `form` says of csrc/cuda/conv/few_*


def supports(problem: Problem) -> str | None:
    """None where the backend serves the problem, else the reason why not."""
    if not serves(problem.device):
        return f"its tensors live on a CUDA device, not on {problem.device}"
    if problem.dtype not in native.DTYPE_CODES:
        return f"it has float32, bfloat16 and float16, not {problem.dtype}"
    if isinstance(problem, ConvProblem):
        if problem.dtype == torch.float32 and not problem.tf32:
            return (
                "its float32 convolution rounds products to tf32, which "
                'torch.set_float32_matmul_precision("high") would allow'
            )
        if (reason := problem.refusal()) is not None:
            return reason
        if problem.op == "routed_conv2d_dgrad" and problem.upsample > 1 and problem.stride != (1, 1):
            return f"its gradient of an upsampled image has stride 1, not {problem.stride}"
    launcher, missing = launcher_for(problem.device)
    if launcher is None:
        return missing
    if isinstance(problem, NormProblem):
        backward = problem.op == "routed_group_norm_backward"
        core = native.module
        refuse = core.cuda_group_norm_backward_refusal if backward else core.cuda_group_norm_forward_refusal
        return refuse(**norm_sizes(problem), device=launcher.device_facts(problem.device)) or None
    return None


def form(problem: Problem) -> str:
    """In words, which kernels serve a problem that the backend supports; "" for the general ones."""
    return form_of_conv(problem, launcher_facts(problem.device)) if isinstance(problem, ConvProblem) else ""


def form_of_conv(problem: ConvProblem, facts: Facts) -> str:
    """What `form` says of a convolution on a device with these facts, which need not be here."""
    core = native.module
    refuse = {
        "routed_conv2d": core.cuda_conv_forward_few_refusal,
        "routed_conv2d_dgrad": core.cuda_conv_dgrad_few_refusal,
        "routed_conv2d_wgrad": core.cuda_conv_wgrad_few_refusal,
    }[problem.op]
    return "" if refuse(**geometry(problem), device=facts) else FEW_CHANNELS


def leads(problem: Problem) -> bool:
    """Whether the backend comes first on a GPU where nothing was measured: in the form of few channels.

    That reads the image of many channels once, others read it once per tap or pad the few channels to a whole block.
    """
    return supports(problem) is None and form(problem) == FEW_CHANNELS


def _workspace(measure: Any, device: torch.device, arguments: dict[str, Any]) -> Tensor | None:
    """Scratch memory for the launches of these arguments; None where they need none."""
    size = measure(**arguments, device=launcher_facts(device))
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def _ready(t: ConvTensors) -> ConvTensors:
    """Returns the tensors in dense memory, aligned for 16-byte loads (index lists and the weight are left as is)."""
    return type(t)._make([x if x is None or x.dim() in (1, 5) else aligned(x) for x in dense(t)])


def routing_plan(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The routing plan in one launch.

    Args:
        groups: int64 (B,). An id out of range stops the kernel; the error appears at the next call that waits for the
            device.
        num_groups: N.

    Returns:
        order, inverse, offsets, sorted groups and tiles, or None where no kernel serves.
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
    launch_planned(native.module.cuda_launches_routing_plan, groups.device, arguments)
    return order, inverse, offsets, ordered, tiles


def _routing(t: ConvTensors) -> dict[str, int]:
    return {
        "offsets": t.offsets.data_ptr(),
        "weight_index": t.weight_index.data_ptr(),
        "in_widths": address(t.in_widths),
        "out_widths": address(t.out_widths),
    }


def geometry(p: ConvProblem) -> dict[str, Any]:
    """The sizes and the dtype of a convolution as its planners take them."""
    fused = {"x2_channels": p.x2_channels, "upsample": p.upsample} if p.fused else {}
    return {**fused, "tf32": p.tf32, **native.conv_sizes(p)}


def _form(hopper: bool) -> dict[str, bool]:
    return {"hopper": True} if hopper else {}


def _addresses(t: ConvTensors | NormTensors) -> dict[str, int]:
    """Addresses by field name."""
    return {name: place for name, place in addresses(t).items() if place or name not in _IF_GIVEN}


def conv2d(p: ConvProblem, t: ConvTensors, *, hopper: bool = False) -> Tensor:
    """Returns y (B, C_out, OH, OW), channels_last.

    Args:
        p: the problem.
        t: its tensors.
        hopper: in the Hopper form where that serves.
    """
    y = empty_nhwc(t.x, p.batch, p.out_channels, p.out_height, p.out_width)
    if p.batch == 0:
        return y
    t = _tiled(p, t)
    arguments = {"y": y.data_ptr(), **_addresses(t), **geometry(p), **_form(hopper)}
    if hopper and p.upsample > 1:
        workspace = _workspace(native.module.cuda_conv_forward_workspace, p.device, arguments)
        arguments["workspace"] = address(workspace)
    launch_planned(native.module.cuda_launches_conv_forward, p.device, arguments)
    return y


def conv2d_dgrad(p: ConvProblem, dy: Tensor, t: ConvTensors, *, hopper: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns dx (B, C_in - C_2, H, W) and dx2 (B, C_2, H, W) or None, channels_last.

    Args:
        p: the problem.
        dy: gradient of y.
        t: the tensors of the forward.
        hopper: in the Hopper form where that serves.
    """
    dx = empty_nhwc(dy, p.batch, p.in_channels - p.x2_channels, p.height, p.width)
    dx2 = empty_nhwc(dy, p.batch, p.x2_channels, p.height, p.width) if p.x2_channels else None
    if p.batch == 0:
        return dx, dx2
    dy, t = aligned(nhwc(dy)), _tiled(p, t)
    arguments = {
        "dy": dy.data_ptr(),
        "weight": t.weight.data_ptr(),
        "dx": dx.data_ptr(),
        "tiles": t.tiles.data_ptr(),
        **_routing(t),
        **geometry(p),
        **_form(hopper),
    }
    if dx2 is not None:
        arguments["dx2"] = dx2.data_ptr()
    if p.upsample > 1:
        workspace = _workspace(native.module.cuda_conv_dgrad_workspace, p.device, arguments)
        arguments["workspace"] = address(workspace)
    launch_planned(native.module.cuda_launches_conv_dgrad, p.device, arguments)
    return dx, dx2


def _tiled(p: ConvProblem, t: ConvTensors) -> ConvTensors:
    """Returns the tensors in the memory order that the forward and dgrad read, with a tile table."""
    weight, tiles = aligned(channel_innermost(t.weight)), tiles_of(t.tiles, t.offsets, p.batch)
    return _ready(t._replace(weight=weight, tiles=tiles))


def conv2d_wgrad(
    p: ConvProblem, dy: Tensor, t: ConvTensors, mask: tuple[bool, bool, bool], *, hopper: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dweight in the strides of weight, dbias (E, C_out), dsample_bias (B, C_out); None where unmasked.

    The kernel writes dweight channel-innermost; where weight has other strides, it is copied into those.
    """
    dweight, dbias, dsample_bias = empty_wgrad(p, t.weight, mask)
    if p.batch == 0:
        return dweight, dbias, dsample_bias
    written = dweight
    if dweight is not None and not is_channel_innermost(dweight):
        written = empty_channel_innermost(dweight.shape, dweight.dtype, dweight.device)
    dy, t = aligned(nhwc(dy)), _ready(t)
    arguments = {
        "x": t.x.data_ptr(),
        "dy": dy.data_ptr(),
        "dweight": address(written),
        "dbias": address(dbias),
        "dsample_bias": address(dsample_bias),
        "workspace": 0,
        **_routing(t),
        **geometry(p),
        **_form(hopper),
    }
    if t.x2 is not None:
        arguments["x2"] = t.x2.data_ptr()
    workspace = _workspace(native.module.cuda_conv_wgrad_workspace, p.device, arguments)
    launch_planned(native.module.cuda_launches_conv_wgrad, p.device, arguments | {"workspace": address(workspace)})
    if dweight is not None and written is not None and written is not dweight:
        dweight.copy_(written)
    return dweight, dbias, dsample_bias


def norm_sizes(p: NormProblem) -> dict[str, Any]:
    """The sizes and the dtype of a group norm as its planners take them."""
    second = {"x2_channels": p.x2_channels} if p.x2_channels else {}
    return {**second, **native.norm_sizes(p)}


def _norm_memory(p: NormProblem, t: NormTensors) -> tuple[NormTensors, dict[str, Any]]:
    """Returns the tensors in the memory order that kernels read, and the arguments that forward and backward share."""
    scale, shift = _rows(t.scale), _rows(t.shift)
    x2 = None if t.x2 is None else aligned(nhwc(t.x2))
    t = t._replace(x=aligned(nhwc(t.x)), x2=x2, scale=None, shift=None)
    t = dense(t)._replace(scale=scale, shift=shift)
    strides = {
        "scale_stride": 0 if scale is None else scale.stride(0),
        "shift_stride": 0 if shift is None else shift.stride(0),
    }
    return t, {"workspace": 0, **_addresses(t), **strides, **norm_sizes(p)}


def _rows(tensor: Tensor | None) -> Tensor | None:
    """Returns (B, C) with dense rows: scale and shift are mostly halves of one (B, 2 C), which need no copy."""
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


def group_norm(p: NormProblem, t: NormTensors, *, streamed: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y (B, C, H, W), channels_last; mean and rstd (B, norm groups) fp32; counters, zeros.

    Args:
        p: the problem.
        t: its tensors.
        streamed: as a stream or by clusters, where these serve.
    """
    y = empty_nhwc(t.x, p.batch, p.channels, p.height, p.width)
    mean = torch.empty((p.batch, p.num_norm_groups), dtype=torch.float32, device=t.x.device)
    rstd = torch.empty_like(mean)
    make = torch.zeros if p.batch == 0 else torch.empty
    counters = make((p.num_experts, p.num_norm_groups), dtype=torch.int32, device=t.x.device)
    if p.batch == 0:
        return y, mean, rstd, counters
    t, arguments = _norm_memory(p, t)
    arguments |= {"y": y.data_ptr(), "mean": mean.data_ptr(), "rstd": rstd.data_ptr(), "counters": counters.data_ptr()}
    if streamed:
        arguments["streamed"] = True
    workspace = _workspace(native.module.cuda_group_norm_forward_workspace, p.device, arguments)
    planner = native.module.cuda_launches_group_norm_forward
    launch_planned(planner, p.device, arguments | {"workspace": address(workspace)})
    return y, mean, rstd, counters


def group_norm_backward(
    p: NormProblem,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    t: NormTensors,
    mask: tuple[bool, bool, bool, bool, bool, bool],
    *,
    streamed: bool = False,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias, scale, shift and x2, in their shapes; None where unmasked.

    Args:
        p: the problem.
        dy: the gradient of y.
        mean: (B, norm groups) fp32, of the forward, as is rstd.
        rstd: see mean.
        t: the tensors of the forward, with its counters.
        mask: which gradients are wanted, in the order of the results.
        streamed: as a stream or by clusters, where these serve.
    """
    grads = empty_norm_gradients(p, dy, mask)
    if p.batch == 0:
        return grads
    dx, dweight, dbias, dscale, dshift, dx2 = grads
    t, arguments = _norm_memory(p, t)
    dy, mean, rstd = aligned(nhwc(dy)), mean.contiguous(), rstd.contiguous()
    arguments |= {
        "dy": dy.data_ptr(),
        "mean": mean.data_ptr(),
        "rstd": rstd.data_ptr(),
        "dx": address(dx),
        "dweight": address(dweight),
        "dbias": address(dbias),
        "dscale": address(dscale),
        "dshift": address(dshift),
    }
    if dx2 is not None:
        arguments["dx2"] = dx2.data_ptr()
    if streamed:
        arguments["streamed"] = True
    workspace = _workspace(native.module.cuda_group_norm_backward_workspace, p.device, arguments)
    planner = native.module.cuda_launches_group_norm_backward
    launch_planned(planner, p.device, arguments | {"workspace": address(workspace)})
    return grads
