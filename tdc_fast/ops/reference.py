"""The oracle: every operator in plain torch, for any float dtype on any device.

Inputs are concatenated and upsampled first. Convolutions run group by group, the group norm on all samples at once.
Sums are in fp32 (fp64 for fp64) and results are rounded once. Reading the group bounds waits for the device: this
backend is for checking, not for speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.ops.check_values import check_conv_values, check_norm_values
from tdc_fast.ops.checks import accumulate_dtype
from tdc_fast.ops.inputs import joined, split_channels, upsampled

name = "reference"
fuses = ("x2", "upsample")


def supports(problem: Problem) -> str | None:
    """None: this backend serves every problem."""
    return None


def _segments(t: ConvTensors) -> Iterator[tuple[slice, int, int, int]]:
    """Yields the samples, the expert, and the live input and output channels of each group that has samples."""
    groups = t.weight_index.shape[0]
    bounds, experts = t.offsets.tolist(), t.weight_index.tolist()
    live_in = [t.weight.shape[2]] * groups if t.in_widths is None else t.in_widths.tolist()
    live_out = [t.weight.shape[1]] * groups if t.out_widths is None else t.out_widths.tolist()
    for group in range(groups):
        if bounds[group] < bounds[group + 1]:
            yield slice(bounds[group], bounds[group + 1]), experts[group], live_in[group], live_out[group]


def _zeros_nhwc(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.zeros(shape, dtype=like.dtype, device=like.device).to(memory_format=torch.channels_last)


def conv2d(problem: ConvProblem, t: ConvTensors) -> Tensor:
    """Returns y (B, C_out, OH, OW), channels_last."""
    check_conv_values(problem, t)
    x, acc = _whole_input(problem, t), accumulate_dtype(t.x.dtype)
    y = _zeros_nhwc(x, problem.out_channels, problem.out_height, problem.out_width)
    for samples, expert, live_in, live_out in _segments(t):
        if live_out == 0:
            continue
        shape = (samples.stop - samples.start, live_out, problem.out_height, problem.out_width)
        total = torch.zeros(shape, dtype=acc, device=x.device)
        if live_in:
            filters = t.weight[expert, :live_out, :live_in].to(acc)
            inputs = x[samples, :live_in].to(acc)
            total += F.conv2d(inputs, filters, None, problem.stride, problem.padding)
        if t.bias is not None:
            total += t.bias[expert, :live_out, None, None]
        if t.sample_bias is not None:
            total += t.sample_bias[samples, :live_out, None, None]
        if t.residual is not None:
            total += t.residual[samples, :live_out]
        y[samples, :live_out] = total.to(x.dtype)
    return y


def conv2d_dgrad(problem: ConvProblem, dy: Tensor, t: ConvTensors) -> tuple[Tensor, Tensor | None]:
    """Returns dx (B, C_in - C_2, H, W) and dx2 (B, C_2, H, W) or None, channels_last."""
    check_conv_values(problem, t)
    acc, up = accumulate_dtype(dy.dtype), problem.upsample
    dx = _zeros_nhwc(dy, problem.in_channels, problem.height, problem.width)
    for samples, expert, live_in, live_out in _segments(t):
        if live_in == 0 or live_out == 0:
            continue
        filters = t.weight[expert, :live_out, :live_in].to(acc)
        grads = dy[samples, :live_out].to(acc)
        shape = [grads.shape[0], live_in, up * problem.height, up * problem.width]
        per_pixel = conv_grad.conv2d_input(shape, filters, grads, problem.stride, problem.padding)
        per_pixel = per_pixel.unflatten(3, (-1, up)).unflatten(2, (-1, up)).sum((3, 5))
        dx[samples, :live_in] = per_pixel.to(dy.dtype)
    return split_channels(dx, problem.x2_channels)


def conv2d_wgrad(
    problem: ConvProblem, dy: Tensor, t: ConvTensors, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Returns dweight (E, C_out, C_in, R, S), dbias (E, C_out), dsample_bias (B, C_out); None where unmasked."""
    check_conv_values(problem, t)
    acc = accumulate_dtype(dy.dtype)
    x = _whole_input(problem, t) if mask[0] else t.x
    dweight = torch.zeros_like(t.weight, dtype=acc)
    dbias = torch.zeros(t.weight.shape[:2], dtype=acc, device=dy.device)
    dsample_bias = torch.zeros(dy.shape[:2], dtype=acc, device=dy.device)
    for samples, expert, live_in, live_out in _segments(t):
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
    return tuple(g.to(dy.dtype) if wanted else None for g, wanted in zip(grads_out, mask, strict=True))


def _whole_input(problem: ConvProblem, t: ConvTensors) -> Tensor:
    """The input as one tensor of its final size."""
    x = joined(t.x, t.x2)
    return x if problem.upsample == 1 else upsampled(x)


def live_channels(widths: Tensor, offsets: Tensor, batch: int, channels: int) -> Tensor:
    """(B, C) bool: whether a channel is within the width of its sample's group. Does not wait for the device."""
    positions = torch.arange(batch, device=offsets.device, dtype=torch.int32)
    group = torch.searchsorted(offsets[1:], positions, right=True)
    return torch.arange(channels, device=widths.device) < widths.index_select(0, group)[:, None]


def expert_per_sample(offsets: Tensor, weight_index: Tensor, batch: int) -> Tensor:
    """(B,) int32: the expert of each sorted sample."""
    positions = torch.arange(batch, device=offsets.device, dtype=torch.int32)
    return weight_index.index_select(0, torch.searchsorted(offsets[1:], positions, right=True))


def _live(problem: NormProblem, t: NormTensors) -> Tensor:
    """(B, C) bool."""
    if t.widths is None:
        return torch.ones(problem.batch, problem.channels, dtype=torch.bool, device=t.x.device)
    return live_channels(t.widths, t.offsets, problem.batch, problem.channels)


def _zero_dead(tensor: Tensor, live: Tensor) -> Tensor:
    """Returns tensor (B, C, ...) in the accumulation dtype, exact zeros where dead (a product would keep NaN)."""
    tensor = tensor.to(accumulate_dtype(tensor.dtype))
    return tensor.where(live.view(live.shape + (1,) * (tensor.dim() - 2)), 0)


def group_norm(problem: NormProblem, t: NormTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y (B, C, H, W), channels_last; mean, rstd (B, norm groups) in the accumulation dtype; counters."""
    check_norm_values(problem, t)
    shape = (problem.batch, problem.num_norm_groups, problem.channels_per_group * problem.height * problem.width)
    live = _live(problem, t)
    x = joined(t.x, t.x2)
    grouped = _zero_dead(x, live).reshape(shape)
    group_live = live[:, :: problem.channels_per_group]
    mean = grouped.mean(2)
    variance = (grouped - mean[:, :, None]).square().mean(2)
    rstd = _zero_dead((variance + problem.eps).rsqrt(), group_live)
    normal = ((grouped - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    y, _ = _affine(normal, t, live, expert_per_sample(t.offsets, t.weight_index, problem.batch))
    y = F.silu(y) if problem.silu else y
    counters = t.x.new_zeros((problem.num_experts, problem.num_norm_groups), dtype=torch.int32)
    return y.to(t.x.dtype).contiguous(memory_format=torch.channels_last), mean, rstd, counters


def _affine(normal: Tensor, t: NormTensors, live: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the result of both affines, the expert's and then the sample's, and that of the expert's alone."""
    affine = normal * _zero_dead(t.weight.index_select(0, expert), live)[:, :, None, None]
    affine = affine + _zero_dead(t.bias.index_select(0, expert), live)[:, :, None, None]
    y = affine
    if t.scale is not None:
        y = y * (1 + _zero_dead(t.scale, live)[:, :, None, None])
    if t.shift is not None:
        y = y + _zero_dead(t.shift, live)[:, :, None, None]
    return y, affine


def group_norm_backward(
    problem: NormProblem,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    t: NormTensors,
    mask: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias, scale, shift and x2, in their shapes; None where unmasked."""
    check_norm_values(problem, t)
    shape = (problem.batch, problem.num_norm_groups, problem.channels_per_group * problem.height * problem.width)
    live = _live(problem, t)
    expert = expert_per_sample(t.offsets, t.weight_index, problem.batch)
    x = joined(t.x, t.x2)
    grouped = _zero_dead(x, live).reshape(shape)
    normal = ((grouped - mean[:, :, None]) * rstd[:, :, None]).reshape(x.shape)
    y, affine = _affine(normal, t, live, expert)
    grad = _zero_dead(dy, live)
    if problem.silu:
        sigmoid = torch.sigmoid(y)
        grad = grad * sigmoid * (1 + y * (1 - sigmoid))
    dshift = grad.sum((2, 3))
    dscale = (grad * affine).sum((2, 3))
    if t.scale is not None:
        grad = grad * (1 + _zero_dead(t.scale, live)[:, :, None, None])
    dweight = _sum_per_expert((grad * normal).sum((2, 3)), t)
    dbias = _sum_per_expert(grad.sum((2, 3)), t)
    grad = grad * _zero_dead(t.weight.index_select(0, expert), live)[:, :, None, None]
    grad, flat = grad.reshape(shape), normal.reshape(shape)
    projection = (grad * flat).mean(2, keepdim=True)
    dx = rstd[:, :, None] * (grad - grad.mean(2, keepdim=True) - flat * projection)
    dx = dx.reshape(x.shape).contiguous(memory_format=torch.channels_last)
    dx, dx2 = split_channels(dx, problem.x2_channels)
    grads = (dx, dweight, dbias, dscale, dshift, dx2)
    return tuple(g.to(dy.dtype) if wanted and g is not None else None for g, wanted in zip(grads, mask, strict=True))


def group_norm_tangent(problem: NormProblem, t: NormTensors, moving: NormTensors) -> Tensor:
    """The derivative of `group_norm` in forward mode, of differentiable operations only.

    Args:
        problem: the problem of the forward.
        t: its tensors.
        moving: the direction: the tangent of each tensor, None for one that stays.

    Returns:
        (B, C, H, W), channels_last.
    """
    shape = (problem.batch, problem.num_norm_groups, problem.channels_per_group * problem.height * problem.width)
    live, expert = _live(problem, t), expert_per_sample(t.offsets, t.weight_index, problem.batch)
    x = joined(t.x, t.x2)
    grouped = _zero_dead(x, live).reshape(shape)
    centred = grouped - grouped.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + problem.eps).rsqrt()
    flat = centred * rstd
    normal = flat.reshape(x.shape)
    y, affine = _affine(normal, t, live, expert)
    step = torch.zeros_like(normal)
    if moving.x is not None or moving.x2 is not None:
        by_x = torch.zeros_like(t.x) if moving.x is None else moving.x
        by_x2 = torch.zeros_like(t.x2) if moving.x2 is None and t.x2 is not None else moving.x2
        along = _zero_dead(joined(by_x, by_x2), live).reshape(shape)
        along = along - along.mean(2, keepdim=True)
        step = (rstd * (along - flat * (flat * along).mean(2, keepdim=True))).reshape(x.shape)
        step = step * _per_pixel(t.weight.index_select(0, expert), live)
    if moving.weight is not None:
        step = step + normal * _per_pixel(moving.weight.index_select(0, expert), live)
    if moving.bias is not None:
        step = step + _per_pixel(moving.bias.index_select(0, expert), live)
    if t.scale is not None:
        step = step * (1 + _per_pixel(t.scale, live))
    if moving.scale is not None:
        step = step + affine * _per_pixel(moving.scale, live)
    if moving.shift is not None:
        step = step + _per_pixel(moving.shift, live)
    if problem.silu:
        sigmoid = torch.sigmoid(y)
        step = step * sigmoid * (1 + y * (1 - sigmoid))
    memory = step.to(t.x.dtype).permute(0, 2, 3, 1).contiguous()  # torch.vmap has no channels_last copies
    return memory.permute(0, 3, 1, 2)


def _per_pixel(per_sample: Tensor, live: Tensor) -> Tensor:
    """Views (B, C) as (B, C, 1, 1), zero where dead."""
    return _zero_dead(per_sample, live)[:, :, None, None]


def _sum_per_expert(per_sample: Tensor, t: NormTensors) -> Tensor:
    """Sums (B, C) to (E, C), one group after the other."""
    total = torch.zeros(t.weight.shape, dtype=per_sample.dtype, device=per_sample.device)
    bounds = t.offsets.tolist()
    for group, expert in enumerate(t.weight_index.tolist()):
        total[expert] += per_sample[bounds[group] : bounds[group + 1]].sum(0)
    return total
