"""The oracle: every operator in plain torch, for any float dtype on any device.

Convolutions go segment by segment, the group norm sample by sample. Sums are in fp32 (fp64 for fp64) and results are
rounded once. Reading the segments waits for the device; that is the price of being readable.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from tdc_fast.kernels.problems import ConvProblem, NormProblem
from tdc_fast.ops.checks import accumulate_dtype, check_conv_values, check_norm_values

name = "reference"


def supports(problem: ConvProblem | NormProblem) -> str | None:
    return None


def _segments(
    offsets: Tensor, weight_index: Tensor, in_widths: Tensor | None, out_widths: Tensor | None, weight: Tensor
) -> Iterator[tuple[slice, int, int, int]]:
    """Per group with samples: its samples, its expert, its live input and output channels."""
    groups = weight_index.shape[0]
    bounds, experts = offsets.tolist(), weight_index.tolist()
    live_in = [weight.shape[2]] * groups if in_widths is None else in_widths.tolist()
    live_out = [weight.shape[1]] * groups if out_widths is None else out_widths.tolist()
    for group in range(groups):
        if bounds[group] < bounds[group + 1]:
            yield slice(bounds[group], bounds[group + 1]), experts[group], live_in[group], live_out[group]


def _empty_nhwc(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.zeros(shape, dtype=like.dtype, device=like.device).to(memory_format=torch.channels_last)


def conv2d(
    problem: ConvProblem,
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
    check_conv_values(problem, offsets, weight_index, in_widths, out_widths)
    acc = accumulate_dtype(x.dtype)
    y = _empty_nhwc(x, problem.out_channels, problem.out_height, problem.out_width)
    for samples, expert, live_in, live_out in _segments(offsets, weight_index, in_widths, out_widths, weight):
        if live_out == 0:
            continue
        shape = (samples.stop - samples.start, live_out, problem.out_height, problem.out_width)
        total = torch.zeros(shape, dtype=acc, device=x.device)
        if live_in:
            filters = weight[expert, :live_out, :live_in].to(acc)
            inputs = x[samples, :live_in].to(acc)
            total += F.conv2d(inputs, filters, None, problem.stride, problem.padding)
        if bias is not None:
            total += bias[expert, :live_out, None, None]
        if sample_bias is not None:
            total += sample_bias[samples, :live_out, None, None]
        if residual is not None:
            total += residual[samples, :live_out]
        y[samples, :live_out] = total.to(x.dtype)
    return y


def conv2d_dgrad(
    problem: ConvProblem,
    dy: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
) -> Tensor:
    check_conv_values(problem, offsets, weight_index, in_widths, out_widths)
    acc = accumulate_dtype(dy.dtype)
    dx = _empty_nhwc(dy, problem.in_channels, problem.height, problem.width)
    for samples, expert, live_in, live_out in _segments(offsets, weight_index, in_widths, out_widths, weight):
        if live_in == 0 or live_out == 0:
            continue
        filters = weight[expert, :live_out, :live_in].to(acc)
        grads = dy[samples, :live_out].to(acc)
        shape = [grads.shape[0], live_in, problem.height, problem.width]
        dx[samples, :live_in] = conv_grad.conv2d_input(shape, filters, grads, problem.stride, problem.padding).to(
            dy.dtype
        )
    return dx


def conv2d_wgrad(
    problem: ConvProblem,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    check_conv_values(problem, offsets, weight_index, in_widths, out_widths)
    acc = accumulate_dtype(dy.dtype)
    dweight = torch.zeros_like(weight, dtype=acc)
    dbias = torch.zeros(weight.shape[:2], dtype=acc, device=dy.device)
    dsample_bias = torch.zeros(dy.shape[:2], dtype=acc, device=dy.device)
    for samples, expert, live_in, live_out in _segments(offsets, weight_index, in_widths, out_widths, weight):
        grads = dy[samples, :live_out].to(acc)
        dsample_bias[samples, :live_out] = grads.sum((2, 3))
        dbias[expert, :live_out] += grads.sum((0, 2, 3))
        if mask[0] and live_in and live_out:
            shape = [live_out, live_in, *problem.filter]
            inputs = x[samples, :live_in].to(acc)
            dweight[expert, :live_out, :live_in] += conv_grad.conv2d_weight(
                inputs, shape, grads, problem.stride, problem.padding
            )
    grads_out = (dweight, dbias, dsample_bias)
    return tuple(g.to(dy.dtype) if wanted else None for g, wanted in zip(grads_out, mask, strict=True))  # type: ignore[return-value]


def live_channels(widths: Tensor, offsets: Tensor, batch: int, channels: int) -> Tensor:
    """(B, C) bool: is this channel of this sample within the width of its group? Does not wait for the device."""
    positions = torch.arange(batch, device=offsets.device, dtype=torch.int32)
    group = torch.searchsorted(offsets[1:], positions, right=True)
    return torch.arange(channels, device=widths.device) < widths.index_select(0, group)[:, None]


def expert_per_sample(offsets: Tensor, weight_index: Tensor, batch: int) -> Tensor:
    """(B,) int32: the expert of each sorted sample."""
    positions = torch.arange(batch, device=offsets.device, dtype=torch.int32)
    return weight_index.index_select(0, torch.searchsorted(offsets[1:], positions, right=True))


def _live(problem: NormProblem, x: Tensor, offsets: Tensor, widths: Tensor | None) -> Tensor:
    if widths is None:
        return torch.ones(problem.batch, problem.channels, dtype=torch.bool, device=x.device)
    return live_channels(widths, offsets, problem.batch, problem.channels)


def _zero_dead(tensor: Tensor, live: Tensor) -> Tensor:
    """tensor (B, C, ...) in the accumulation dtype, with exact zeros where dead (a product would keep NaN)."""
    tensor = tensor.to(accumulate_dtype(tensor.dtype))
    return tensor.where(live.view(live.shape + (1,) * (tensor.dim() - 2)), 0)


def group_norm(
    problem: NormProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    offsets: Tensor,
    weight_index: Tensor,
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm_values(problem, offsets, weight_index, widths)
    shape = (problem.batch, problem.num_norm_groups, problem.channels_per_group * problem.height * problem.width)
    live = _live(problem, x, offsets, widths)
    grouped = _zero_dead(x, live).reshape(shape)
    group_live = live[:, :: problem.channels_per_group]
    mean = grouped.mean(2)
    variance = (grouped - mean[:, :, None]).square().mean(2)
    rstd = _zero_dead((variance + problem.eps).rsqrt(), group_live)
    normal = ((grouped - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    y, _ = _affine(normal, weight, bias, scale, shift, live, expert_per_sample(offsets, weight_index, problem.batch))
    y = F.silu(y) if problem.silu else y
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last), mean, rstd


def _affine(
    normal: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    live: Tensor,
    expert: Tensor,
) -> tuple[Tensor, Tensor]:
    """Expert's affine, then the sample's; also returns what `scale` multiplies."""
    affine = normal * _zero_dead(weight.index_select(0, expert), live)[:, :, None, None]
    affine = affine + _zero_dead(bias.index_select(0, expert), live)[:, :, None, None]
    y = affine
    if scale is not None:
        y = y * (1 + _zero_dead(scale, live)[:, :, None, None])
    if shift is not None:
        y = y + _zero_dead(shift, live)[:, :, None, None]
    return y, affine


def group_norm_backward(
    problem: NormProblem,
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
    check_norm_values(problem, offsets, weight_index, widths)
    shape = (problem.batch, problem.num_norm_groups, problem.channels_per_group * problem.height * problem.width)
    live = _live(problem, x, offsets, widths)
    expert = expert_per_sample(offsets, weight_index, problem.batch)
    grouped = _zero_dead(x, live).reshape(shape)
    normal = ((grouped - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    y, affine = _affine(normal, weight, bias, scale, shift, live, expert)
    grad = _zero_dead(dy, live)
    if problem.silu:
        sigmoid = torch.sigmoid(y)
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    dshift = grad.sum((2, 3))
    dscale = (grad * affine).sum((2, 3))
    if scale is not None:
        grad = grad * (1 + _zero_dead(scale, live)[:, :, None, None])
    dweight = _sum_per_expert((grad * normal).sum((2, 3)), offsets, weight_index, weight)
    dbias = _sum_per_expert(grad.sum((2, 3)), offsets, weight_index, weight)
    grad = grad * _zero_dead(weight.index_select(0, expert), live)[:, :, None, None]
    grad, flat = grad.reshape(shape), normal.reshape(shape)
    projection = (grad * flat).mean(2, keepdim=True)
    dx = rstd[:, :, None] * (grad - grad.mean(2, keepdim=True) - flat * projection)
    dx = dx.reshape(x.shape).contiguous(memory_format=torch.channels_last)
    grads = (dx, dweight, dbias, dscale, dshift)
    return tuple(g.to(dy.dtype) if wanted else None for g, wanted in zip(grads, mask, strict=True))  # type: ignore[return-value]


def _sum_per_expert(per_sample: Tensor, offsets: Tensor, weight_index: Tensor, weight: Tensor) -> Tensor:
    """(B, C) -> (E, C), group after group."""
    total = torch.zeros(weight.shape, dtype=per_sample.dtype, device=per_sample.device)
    bounds = offsets.tolist()
    for group, expert in enumerate(weight_index.tolist()):
        total[expert] += per_sample[bounds[group] : bounds[group + 1]].sum(0)
    return total
