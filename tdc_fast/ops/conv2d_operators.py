"""The registered operators behind routed_conv2d: schemas, implementations, fakes, gradient, autocast.

    tdc_fast::routed_conv2d    tdc_fast::routed_conv2d_dgrad    tdc_fast::routed_conv2d_wgrad

Their schemas are flat lists of arguments; everything below them takes ConvTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.ops import backends, library
from tdc_fast.ops.checks import check_conv_values, check_memory, conv_problem, converted, tf32_is_allowed
from tdc_fast.ops.reference import live_channels

_WIDTHS_SCHEMA = "Tensor weight_index, Tensor? in_widths, Tensor? out_widths"
_ROUTING_SCHEMA = f"Tensor offsets, {_WIDTHS_SCHEMA}"
_TILED_SCHEMA = f"Tensor offsets, Tensor tiles, {_WIDTHS_SCHEMA}"
_SETTINGS_SCHEMA = "int[2] stride, int[2] padding"


def _tensors(args: tuple[Any, ...]) -> ConvTensors:
    """The tensors, which come first in the forward's schema."""
    x, weight, bias, sample_bias, residual, offsets, tiles, weight_index, in_widths, out_widths = args
    return ConvTensors(x, weight, offsets, tiles, weight_index, in_widths, out_widths, bias, sample_bias, residual)


def _tensors_of_dgrad(weight: Tensor, *routing: Any) -> ConvTensors:
    return ConvTensors(None, weight, *routing)  # type: ignore[arg-type]


def _tensors_of_wgrad(x: Tensor, weight: Tensor, offsets: Tensor, *routing: Any) -> ConvTensors:
    return ConvTensors(x, weight, offsets, None, *routing)  # type: ignore[arg-type]


def _pair(values: Sequence[int]) -> tuple[int, int]:
    """The dispatcher passes lists of ints as lists; a problem must be hashable."""
    return values[0], values[1]


def _choose(
    op: str,
    t: ConvTensors,
    settings: tuple[tuple[int, int], tuple[int, int]],
    backend: str,
    dy: Tensor | None = None,
    image_size: tuple[int, ...] = (),
) -> tuple[ConvProblem, Any]:
    """The problem and the backend for it."""

    def describe() -> ConvProblem:
        return conv_problem(op, t, *settings, dy=dy, image_size=image_size)

    key = (op, settings, image_size, tf32_is_allowed())
    if dy is None:
        return backends.remembered(key, t, describe, backend)
    return backends.remembered(key, t, describe, backend, dy=dy)


def _run(kernel: Callable[..., Any], problem: ConvProblem, t: ConvTensors, *args: Any) -> Any:
    """Runs a backend's function. Backends check the numbers that they index with; our own error says more."""
    try:
        return kernel(problem, *args)
    except ValueError:
        check_conv_values(problem, t)
        raise


def forward_problem(*args: Any) -> ConvProblem:
    """The problem of the forward's arguments but `backend`; raises the ValueErrors that the forward would raise."""
    t = _tensors(args[:-2])
    problem = conv_problem("routed_conv2d", t, *args[-2:])
    check_memory(**t._asdict())
    check_conv_values(problem, t)
    return problem


def _forward(*args: Any) -> Tensor:
    stride, padding, backend = args[-3:]
    t = _tensors(args[:-3])
    problem, chosen = _choose("routed_conv2d", t, (_pair(stride), _pair(padding)), backend)
    return _run(chosen.conv2d, problem, t, t)


def _forward_fake(*args: Any) -> Tensor:
    stride, padding, _ = args[-3:]
    t = _tensors(args[:-3])
    p = conv_problem("routed_conv2d", t, _pair(stride), _pair(padding))
    return _empty_nhwc(t.x, p.batch, p.out_channels, p.out_height, p.out_width)


def _empty_nhwc(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


forward = library.define(
    "routed_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? sample_bias, Tensor? residual, "
    f"{_TILED_SCHEMA}, {_SETTINGS_SCHEMA}, str backend) -> Tensor",
    _forward,
    _forward_fake,
)


def _dgrad(dy: Tensor, *args: Any) -> Tensor:
    *tensors, image_size, stride, padding, backend = args
    t = _tensors_of_dgrad(*tensors)
    problem, chosen = _choose("routed_conv2d_dgrad", t, (_pair(stride), _pair(padding)), backend, dy, _pair(image_size))
    return _run(chosen.conv2d_dgrad, problem, t, dy, t)


def _dgrad_fake(dy: Tensor, *args: Any) -> Tensor:
    *tensors, image_size, stride, padding, _ = args
    t = _tensors_of_dgrad(*tensors)
    p = conv_problem("routed_conv2d_dgrad", t, _pair(stride), _pair(padding), dy=dy, image_size=image_size)
    return _empty_nhwc(dy, p.batch, p.in_channels, p.height, p.width)


_dgrad_op = library.define(
    f"routed_conv2d_dgrad(Tensor dy, Tensor weight, {_TILED_SCHEMA}, SymInt[2] image_size, {_SETTINGS_SCHEMA}, "
    "str backend) -> Tensor",
    _dgrad,
    _dgrad_fake,
)


def _wgrad(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, stride, padding, mask, backend = args
    t = _tensors_of_wgrad(*tensors)
    problem, chosen = _choose("routed_conv2d_wgrad", t, (_pair(stride), _pair(padding)), backend, dy)
    grads = _run(chosen.conv2d_wgrad, problem, t, dy, t, tuple(mask))
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _wgrad_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, stride, padding, mask, _ = args
    t = _tensors_of_wgrad(*tensors)
    p = conv_problem("routed_conv2d_wgrad", t, _pair(stride), _pair(padding), dy=dy)
    return (
        torch.empty_like(t.weight) if mask[0] else dy.new_empty(0),
        dy.new_empty((p.num_experts, p.out_channels) if mask[1] else 0),
        dy.new_empty((p.batch, p.out_channels) if mask[2] else 0),
    )


# Gradients that `mask` does not ask for come back as empty tensors: a schema has no optional results.
_wgrad_op = library.define(
    f"routed_conv2d_wgrad(Tensor dy, Tensor x, Tensor weight, {_ROUTING_SCHEMA}, {_SETTINGS_SCHEMA}, "
    "bool[3] mask, str backend) -> (Tensor, Tensor, Tensor)",
    _wgrad,
    _wgrad_fake,
)


def _save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, weight, _, _, _, *routing, stride, padding, backend = args
    ctx.image_size, ctx.settings, ctx.backend = x.shape[2:], (stride, padding), backend
    only_wgrad_reads_x = any(ctx.needs_input_grad[1:4])
    ctx.save_for_backward(x if only_wgrad_reads_x else None, weight, *routing)


@library.once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, tiles, *widths = ctx.saved_tensors
    out_widths = widths[-1]
    needs = ctx.needs_input_grad
    dx = dweight = dbias = dsample_bias = dresidual = None
    mask = needs[1:4]
    if not (dy.is_contiguous(memory_format=torch.channels_last) and (needs[0] or any(mask))):
        # dgrad and wgrad check what they read, but this may be the first to read it
        check_memory(dy=dy, offsets=offsets, out_widths=out_widths)
        dy = dy.contiguous(memory_format=torch.channels_last)  # once, for dgrad and wgrad
    if needs[0]:
        settings = (ctx.image_size, *ctx.settings, ctx.backend)
        dx = library.call_in_backward(ctx, _dgrad_op, dy, weight, offsets, tiles, *widths, *settings)
    if any(mask):
        settings = (*ctx.settings, mask, ctx.backend)
        grads = library.call_in_backward(ctx, _wgrad_op, dy, x, weight, offsets, *widths, *settings)
        dweight, dbias, dsample_bias = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    if needs[4]:
        dresidual = dy
        if out_widths is not None:
            live = live_channels(out_widths, offsets, dy.shape[0], dy.shape[1])
            dresidual = torch.where(live[:, :, None, None], dy, 0)
    return dx, dweight, dbias, dsample_bias, dresidual, *(None,) * 8


def _tangent(args: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The convolution is linear in x and weight each, and in the rest together."""
    x, weight = args[:2]
    dx, dweight, *dadded = tangents[:5]
    rest = args[5:]
    if dweight is None:
        return forward(torch.zeros_like(x) if dx is None else dx, weight, *dadded, *rest)
    along_weight = forward(x, dweight, *dadded, *rest)
    return along_weight if dx is None else along_weight + forward(dx, weight, None, None, None, *rest)


_ARGUMENTS = [argument.name for argument in forward._schema.arguments]


def _cast(device_type: str, *args: Any) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        converted(name, arg, dtype)
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
        else arg
        for name, arg in zip(_ARGUMENTS, args, strict=True)
    )


library.add_autograd(forward, _save, _backward, _tangent)
library.add_autocast(forward, _cast)
