"""The `triton` backend: prepares memory for the kernels of tdc_fast.kernels and launches them.

fp32 (tf32 where the problem allows it), bf16 and fp16 on NVIDIA GPUs from sm_80 on; host memory only where
TRITON_INTERPRET=1 has Triton's interpreter run the kernels, which is for tests. Shapes have been checked before they
come here. The numbers inside offsets, tiles, weight_index and widths stay on the device, where kernels clamp them:
nothing here waits for it. Importing this module imports triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tdc_fast.kernels.channel_sums import channel_sums
from tdc_fast.kernels.common import INTERPRETED
from tdc_fast.kernels.conv_dgrad import conv_dgrad
from tdc_fast.kernels.conv_forward import conv_forward, conv_supported
from tdc_fast.kernels.conv_wgrad import conv_wgrad, wgrad_supported
from tdc_fast.kernels.group_norm import group_norm_backward as norm_backward
from tdc_fast.kernels.group_norm import group_norm_forward as norm_forward
from tdc_fast.kernels.group_norm import norm_supported
from tdc_fast.kernels.problems import ConvProblem, NormProblem
from tdc_fast.kernels.tile_shapes import device_of
from tdc_fast.kernels.tile_table import tiles_of
from tdc_fast.ops.checks import check_conv_values, check_norm_values
from tdc_fast.ops.layout import channel_innermost, empty_channel_innermost, is_channel_innermost, nhwc

name = "triton"
_OLDEST_ARCHITECTURE = 80
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(problem: ConvProblem | NormProblem) -> str | None:
    """None, or why not: reasons of dtype and shape first, then those of the machine."""
    if problem.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, not {problem.dtype}"
    if INTERPRETED and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly, without an error"
    if isinstance(problem, ConvProblem):
        reason = conv_supported(problem)
        if reason is None and problem.op == "routed_conv2d_wgrad":
            reason = wgrad_supported(problem)
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
    """Triton launches on the current device: makes it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
    check_conv_values(p, offsets, weight_index, in_widths, out_widths)
    with _on(x.device):
        return conv_forward(
            p,
            nhwc(x),
            channel_innermost(weight),
            _dense(bias),
            _dense(sample_bias),
            None if residual is None else nhwc(residual),
            tiles_of(tiles, offsets, p.batch).contiguous(),
            weight_index.contiguous(),
            _dense(in_widths),
            _dense(out_widths),
        )


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
    check_conv_values(p, offsets, weight_index, in_widths, out_widths)
    with _on(dy.device):
        return conv_dgrad(
            p,
            nhwc(dy),
            channel_innermost(weight),
            tiles_of(tiles, offsets, p.batch).contiguous(),
            weight_index.contiguous(),
            _dense(in_widths),
            _dense(out_widths),
        )


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
    check_conv_values(p, offsets, weight_index, in_widths, out_widths)
    if p.batch == 0:
        return (
            torch.zeros_like(weight) if mask[0] else None,
            weight.new_zeros(weight.shape[:2]) if mask[1] else None,
            dy.new_zeros(dy.shape[:2]) if mask[2] else None,
        )
    dy, offsets, weight_index = nhwc(dy), offsets.contiguous(), weight_index.contiguous()
    in_widths, out_widths = _dense(in_widths), _dense(out_widths)
    dweight = dbias = dsample_bias = None
    with _on(dy.device):
        if mask[0]:
            dweight = torch.empty_like(weight)  # of its strides, where those are dense
            written = dweight
            if not is_channel_innermost(dweight):
                written = empty_channel_innermost(weight.shape, weight.dtype, weight.device)
            conv_wgrad(p, dy, nhwc(x), written, offsets, weight_index, in_widths, out_widths)
            if written is not dweight:
                dweight.copy_(written)
        if mask[1] or mask[2]:
            dbias, dsample_bias = channel_sums(p, dy, offsets, weight_index, out_widths, mask[1], mask[2])
    return dweight, dbias, dsample_bias


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
    check_norm_values(p, offsets, weight_index, widths)
    with _on(x.device):
        return norm_forward(
            p,
            nhwc(x),
            weight.contiguous(),
            bias.contiguous(),
            _dense(scale),
            _dense(shift),
            offsets.contiguous(),
            weight_index.contiguous(),
            _dense(widths),
        )


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
    check_norm_values(p, offsets, weight_index, widths)
    with _on(x.device):
        return norm_backward(
            p,
            nhwc(dy),
            nhwc(x),
            weight.contiguous(),
            bias.contiguous(),
            _dense(scale),
            _dense(shift),
            mean.contiguous(),
            rstd.contiguous(),
            offsets.contiguous(),
            weight_index.contiguous(),
            _dense(widths),
            mask,
        )
