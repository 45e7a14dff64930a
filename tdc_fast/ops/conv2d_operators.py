"""The registered operators behind routed_conv2d: schemas, implementations, fakes, gradient, autocast.

    tdc_fast::routed_conv2d    tdc_fast::routed_conv2d_dgrad    tdc_fast::routed_conv2d_wgrad

Their schemas are flat lists of arguments; everything below them takes ConvTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.ops import backends, call_cache, library
from tdc_fast.ops.check_values import check_conv_values, run_or_explain
from tdc_fast.ops.checks import check_memory, conv_problem, converted, tf32_is_allowed
from tdc_fast.ops.dead_channels import are_zeros, note_zeros
from tdc_fast.ops.layout import empty_nhwc
from tdc_fast.ops.reference import live_channels

_WIDTHS_SCHEMA = "Tensor weight_index, Tensor? in_widths, Tensor? out_widths"
ROUTING_SCHEMA = f"Tensor offsets, {_WIDTHS_SCHEMA}"
TILED_SCHEMA = f"Tensor offsets, Tensor tiles, {_WIDTHS_SCHEMA}"
_SETTINGS_SCHEMA = "int[2] stride, int[2] padding, int upsample"
_Settings = tuple[tuple[int, int], tuple[int, int], int]


def _tensors(args: tuple[Any, ...]) -> ConvTensors:
    """The tensors, which come first in the forward's schema."""
    x, weight, bias, sample_bias, residual, x2, offsets, tiles, weight_index, in_widths, out_widths = args
    return ConvTensors(x, weight, offsets, tiles, weight_index, in_widths, out_widths, bias, sample_bias, residual, x2)


def _tensors_of_dgrad(weight: Tensor, *routing: Any) -> ConvTensors:
    return ConvTensors(None, weight, *routing)  # type: ignore[arg-type]


def _tensors_of_wgrad(x: Tensor, x2: Tensor | None, weight: Tensor, offsets: Tensor, *routing: Any) -> ConvTensors:
    return ConvTensors(x, weight, offsets, None, *routing, x2=x2)  # type: ignore[arg-type,misc]


def _hashable(stride: Sequence[int], padding: Sequence[int], upsample: int) -> _Settings:
    """The dispatcher passes lists of ints as lists; a problem must be hashable."""
    return (stride[0], stride[1]), (padding[0], padding[1]), upsample


def _choose(
    op: str,
    t: ConvTensors,
    settings: _Settings,
    backend: str,
    dy: Tensor | None = None,
    image_size: tuple[int, ...] = (),
    x2_channels: int = 0,
) -> tuple[ConvProblem, Any]:
    """The problem and the backend for it."""

    def describe() -> ConvProblem:
        return conv_problem(op, t, *settings, dy=dy, image_size=image_size, x2_channels=x2_channels)

    key = (op, settings, image_size, x2_channels, tf32_is_allowed())
    if dy is None:
        return backends.remembered(key, t, describe, backend)
    return backends.remembered(key, t, describe, backend, dy=dy)


def forward_problem(*args: Any) -> ConvProblem:
    """The problem of the forward's arguments but `backend`; raises the ValueErrors that the forward would raise."""
    t = _tensors(args[:-3])
    problem = conv_problem("routed_conv2d", t, *args[-3:])
    check_memory(**t._asdict())
    check_conv_values(problem, t)
    return problem


def _forward(*args: Any) -> call_cache.Bound:
    problem, chosen = _choose("routed_conv2d", _tensors(args[:-4]), _hashable(*args[-4:-1]), args[-1])

    def run(*args: Any) -> Tensor:
        t = _tensors(args[:-4])
        return run_or_explain(chosen.conv2d, check_conv_values, problem, t, t)

    return call_cache.Bound(run, backends.only_launches(chosen))


def _forward_fake(*args: Any) -> Tensor:
    t = _tensors(args[:-4])
    p = conv_problem("routed_conv2d", t, *_hashable(*args[-4:-1]))
    return empty_nhwc(t.x, p.batch, p.out_channels, p.out_height, p.out_width)


forward = call_cache.Operator(
    "routed_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? sample_bias, Tensor? residual, "
    f"Tensor? x2, {TILED_SCHEMA}, {_SETTINGS_SCHEMA}, str backend) -> Tensor",
    _forward,
    _forward_fake,
)


def _dgrad(dy: Tensor, *args: Any) -> call_cache.Bound:
    *tensors, image_size, x2_channels, stride, padding, upsample, dead_zeros, backend = args
    t, settings = _tensors_of_dgrad(*tensors), _hashable(stride, padding, upsample)
    problem, chosen = _choose("routed_conv2d_dgrad", t, settings, backend, dy, tuple(image_size), x2_channels)
    if dead_zeros:
        problem = replace(problem, dead_zeros=True)

    def run(dy: Tensor, *args: Any) -> list[Tensor]:
        t = _tensors_of_dgrad(*args[:-7])
        dx, dx2 = run_or_explain(chosen.conv2d_dgrad, check_conv_values, problem, t, dy, t)
        return [dx] if dx2 is None else [dx, dx2]

    return call_cache.Bound(run, backends.only_launches(chosen))


def _dgrad_fake(dy: Tensor, *args: Any) -> list[Tensor]:
    *tensors, image_size, x2_channels, stride, padding, upsample, _, _ = args
    t, size = _tensors_of_dgrad(*tensors), {"image_size": image_size, "x2_channels": x2_channels}
    p = conv_problem("routed_conv2d_dgrad", t, *_hashable(stride, padding, upsample), dy=dy, **size)
    channels = [p.in_channels - x2_channels] + ([x2_channels] if x2_channels else [])
    return [empty_nhwc(dy, p.batch, count, p.height, p.width) for count in channels]


# One gradient for x, and one for x2 where there is one. dead_zeros: dy is known to be zero past out_widths.
dgrad = call_cache.Operator(
    f"routed_conv2d_dgrad(Tensor dy, Tensor weight, {TILED_SCHEMA}, SymInt[2] image_size, SymInt x2_channels, "
    f"{_SETTINGS_SCHEMA}, bool dead_zeros, str backend) -> Tensor[]",
    _dgrad,
    _dgrad_fake,
)


def _wgrad(dy: Tensor, *args: Any) -> call_cache.Bound:
    *tensors, stride, padding, upsample, mask, backend = args
    t = _tensors_of_wgrad(*tensors)
    problem, chosen = _choose("routed_conv2d_wgrad", t, _hashable(stride, padding, upsample), backend, dy)

    def run(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        t = _tensors_of_wgrad(*args[:-5])
        grads = run_or_explain(chosen.conv2d_wgrad, check_conv_values, problem, t, dy, t, tuple(mask))
        return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)

    return call_cache.Bound(run, backends.only_launches(chosen))


def _wgrad_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, stride, padding, upsample, mask, _ = args
    t = _tensors_of_wgrad(*tensors)
    p = conv_problem("routed_conv2d_wgrad", t, *_hashable(stride, padding, upsample), dy=dy)
    return (
        torch.empty_like(t.weight) if mask[0] else dy.new_empty(0),
        dy.new_empty((p.num_experts, p.out_channels) if mask[1] else 0),
        dy.new_empty((p.batch, p.out_channels) if mask[2] else 0),
    )


# Gradients that `mask` does not ask for come back as empty tensors: a schema has no optional results.
wgrad = call_cache.Operator(
    f"routed_conv2d_wgrad(Tensor dy, Tensor x, Tensor? x2, Tensor weight, {ROUTING_SCHEMA}, {_SETTINGS_SCHEMA}, "
    "bool[3] mask, str backend) -> (Tensor, Tensor, Tensor)",
    _wgrad,
    _wgrad_fake,
)


def _save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, weight, _, _, _, x2, *routing, stride, padding, upsample, backend = args
    ctx.input_size = (x.size(2), x.size(3)), 0 if x2 is None else x2.size(1)  # a slice of a shape takes 1 us
    ctx.settings, ctx.backend = _hashable(stride, padding, upsample), backend
    only_wgrad_reads_x = any(ctx.needs_input_grad[1:4])
    inputs = (x, x2) if only_wgrad_reads_x else (None, None)
    ctx.save_for_backward(*inputs, weight, *routing)


def dense_gradient(
    dy: Tensor, memory_format: torch.memory_format, is_read: bool, offsets: Tensor, out_widths: Tensor | None
) -> Tensor:
    """Returns dy in dense memory, once for dgrad and wgrad, which check what they read; `is_read`: one of them runs."""
    if is_read and dy.is_contiguous(memory_format=memory_format):
        return dy
    check_memory(dy=dy, offsets=offsets, out_widths=out_widths)
    return dy.contiguous(memory_format=memory_format)


def live_part(dy: Tensor, offsets: Tensor, out_widths: Tensor | None) -> Tensor:
    """Returns images dy (B, C, H, W) with zeros in dead channels."""
    if out_widths is None:
        return dy
    live = live_channels(out_widths, offsets, dy.shape[0], dy.shape[1])
    return torch.where(live[:, :, None, None], dy, 0)


@library.once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, x2, weight, offsets, tiles, *widths = ctx.saved_tensors
    out_widths = widths[-1]
    needs = ctx.needs_input_grad
    dx = dx2 = dweight = dbias = dsample_bias = dresidual = None
    input_moves, mask = needs[0] or needs[5], needs[1:4]
    dead_zeros = are_zeros(dy, out_widths, offsets)
    dy = dense_gradient(dy, torch.channels_last, input_moves or any(mask), offsets, out_widths)
    if input_moves:
        settings = (*ctx.input_size, *ctx.settings, dead_zeros, ctx.backend)
        dx, *others = dgrad.call(dy, weight, offsets, tiles, *widths, *settings)
        dx2 = others[0] if others else None
        if dx2 is None:
            note_zeros(dx, widths[-2], offsets)
    if any(mask):
        settings = (*ctx.settings, mask, ctx.backend)
        grads = wgrad.call(dy, x, x2, weight, offsets, *widths, *settings)
        dweight, dbias, dsample_bias = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    if needs[4]:
        dresidual = dy if dead_zeros else live_part(dy, offsets, out_widths)
    return dx, dweight, dbias, dsample_bias, dresidual, dx2, *(None,) * 9


def _tangent(args: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The convolution is linear in the input (x and x2) and weight each, and in the rest together."""
    x, weight, *_, x2 = args[:6]
    dx, dweight, *dadded, dx2 = tangents[:6]
    rest = args[6:]
    input_moves = dx is not None or dx2 is not None
    if input_moves or dweight is None:
        dx = torch.zeros_like(x) if dx is None else dx
        dx2 = torch.zeros_like(x2) if dx2 is None and x2 is not None else dx2
    if dweight is None:
        return forward.overload(dx, weight, *dadded, dx2, *rest)
    along_weight = forward.overload(x, dweight, *dadded, x2, *rest)
    return along_weight + forward.overload(dx, weight, None, None, None, dx2, *rest) if input_moves else along_weight


def cast_all(operator: call_cache.Operator) -> Callable[..., tuple[Any, ...]]:
    """What `operator.add_autocast` takes: all floating tensors but those of fp64 get the dtype of autocast."""
    names = [argument.name for argument in operator.overload._schema.arguments]

    def is_cast(dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype != torch.float64

    def cast(device_type: str, *args: Any) -> tuple[Any, ...]:
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(
            [
                converted(name, arg, dtype) if isinstance(arg, Tensor) and is_cast(arg.dtype) else arg
                for name, arg in zip(names, args, strict=True)
            ]
        )

    return cast


forward.add_autograd(_save, _backward, _tangent)
forward.add_autocast(cast_all(forward))
