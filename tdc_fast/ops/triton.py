"""The `triton` backend: prepares memory for the kernels of tdc_fast.kernels and launches them.

fp32 (tf32 where the problem allows it), bf16 and fp16 on NVIDIA GPUs from sm_80 on; in host memory only for tests, when
TRITON_INTERPRET=1 makes Triton's interpreter run the kernels. The caller has checked shapes; the numbers in offsets,
tiles, weight_index and widths stay on the device, where kernels clamp them. Nothing here waits for the device.
Importing this module imports triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tdc_fast.kernels.common import INTERPRETED
from tdc_fast.kernels.conv_dgrad import conv_dgrad
from tdc_fast.kernels.conv_forward import conv_forward, conv_supported
from tdc_fast.kernels.conv_upsampled import upsampled_dgrad, upsampled_forward
from tdc_fast.kernels.conv_wgrad import conv_wgrad, wgrad_supported
from tdc_fast.kernels.group_norm import group_norm_backward as norm_backward
from tdc_fast.kernels.group_norm import group_norm_forward as norm_forward
from tdc_fast.kernels.group_norm import norm_supported
from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.kernels.tile_shapes import device_of
from tdc_fast.kernels.tile_table import tiles_of
from tdc_fast.ops.check_values import check_conv_values, check_norm_values
from tdc_fast.ops.layout import (
    channel_innermost,
    dense,
    empty_channel_innermost,
    empty_wgrad,
    is_channel_innermost,
    nhwc,
)

name = "triton"
fuses = ("x2", "upsample")
only_launches = True
_OLDEST_ARCHITECTURE = 80
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(problem: Problem) -> str | None:
    """None where the backend serves the problem, else why not: first for dtype and shape, then for the machine."""
    if problem.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, not {problem.dtype}"
    if INTERPRETED and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly, without an error"
    if isinstance(problem, ConvProblem):
        if problem.op == "routed_conv2d_wgrad":
            reason = conv_supported(problem.unfused()) or wgrad_supported(problem.unfused())
        else:
            reason = conv_supported(problem)
    else:
        reason = norm_supported(problem)
    return reason or _device_reason(problem.device)


def _device_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device."""
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1: kernels run in host memory, in the interpreter"
    if device.type != "cuda":
        return f"its tensors live on a CUDA device, not on {device}"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use here"
    architecture = device_of(device).arch
    if architecture < _OLDEST_ARCHITECTURE:
        return f"it needs a GPU of compute capability 8.0 or later, not {architecture // 10}.{architecture % 10}"
    return None


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Makes the tensors' device the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def conv2d(p: ConvProblem, t: ConvTensors) -> Tensor:
    """Returns y (B, C_out, OH, OW), channels_last."""
    check_conv_values(p, t)
    with _on(t.x.device):
        return (conv_forward if p.upsample == 1 else upsampled_forward)(p, _tiled(p, t))


def conv2d_dgrad(p: ConvProblem, dy: Tensor, t: ConvTensors) -> tuple[Tensor, Tensor | None]:
    """Returns dx (B, C_in - C_2, H, W) and dx2 (B, C_2, H, W) or None, channels_last."""
    check_conv_values(p, t)
    with _on(dy.device):
        if p.upsample > 1:
            return upsampled_dgrad(p, nhwc(dy), _tiled(p, t)), None
        return conv_dgrad(p, nhwc(dy), _tiled(p, t))


def _tiled(p: ConvProblem, t: ConvTensors) -> ConvTensors:
    """Returns the tensors in the memory order that the forward and dgrad read, with a tile table."""
    t = dense(t)
    weight, tiles = channel_innermost(t.weight), tiles_of(t.tiles, t.offsets, p.batch)
    if weight is t.weight and tiles is t.tiles:  # nearly always; _replace costs 2 us
        return t
    return t._replace(weight=weight, tiles=tiles)


def conv2d_wgrad(
    p: ConvProblem, dy: Tensor, t: ConvTensors, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dweight in the strides of weight, dbias (E, C_out), dsample_bias (B, C_out); None where unmasked."""
    check_conv_values(p, t)
    weight = t.weight
    dweight, dbias, dsample_bias = empty_wgrad(p, weight, mask)
    if p.batch == 0:
        return dweight, dbias, dsample_bias
    dy, t = nhwc(dy), dense(t)
    written = dweight
    if dweight is not None and not is_channel_innermost(dweight):
        written = empty_channel_innermost(weight.shape, weight.dtype, weight.device)
    with _on(dy.device):
        conv_wgrad(p, dy, t, written, dbias, dsample_bias)
    if dweight is not None and written is not None and written is not dweight:
        dweight.copy_(written)
    return dweight, dbias, dsample_bias


def group_norm(p: NormProblem, t: NormTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y (B, C, H, W), channels_last; mean and rstd (B, norm groups) fp32; counters."""
    check_norm_values(p, t)
    with _on(t.x.device):
        return norm_forward(p, dense(t))


def group_norm_backward(
    p: NormProblem,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    t: NormTensors,
    mask: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias, scale, shift and x2, in their shapes; None where unmasked."""
    check_norm_values(p, t)
    with _on(t.x.device):
        return norm_backward(p, nhwc(dy), mean.contiguous(), rstd.contiguous(), dense(t), mask)
