"""routed_conv2d: contract, registration, gradient.

Registered operators: tdc_fast::routed_conv2d, tdc_fast::routed_conv2d_dgrad, tdc_fast::routed_conv2d_wgrad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.ops import backends, library
from tdc_fast.ops.checks import (
    check_conv_values,
    conv_problem,
    pair,
    require_backend_name,
    require_tensors,
    signature,
    tf32_is_allowed,
)
from tdc_fast.ops.plan import RoutingPlan, check_plan
from tdc_fast.ops.reference import live_channels

_OPTIONAL = ("bias", "sample_bias", "residual", "in_widths", "out_widths")


def routed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolves every sample with the weights of its group's expert, in one launch.

    y[b] = conv2d(x[b], weight[e(b)]) + bias[e(b)] + sample_bias[b] + residual[b], where e(b) is plan.weight_index of
    the group of sample b, and samples are sorted by `plan`.

    x: (B, C_in, H, W), any strides (channels_last is free, others are copied).
    weight: (E, C_out, C_in, R, S). bias: (E, C_out). sample_bias: (B, C_out). residual: (B, C_out, OH, OW).
        All of the dtype of x, fp32, bf16, fp16 or fp64; sums are in fp32 (fp64 for fp64).
    in_widths, out_widths: int32 (N,), per group how many input and output channels are live, from 0 to all.
        Dead inputs are not read; dead outputs are exact zeros whatever the other arguments hold. Gradients of
        everything dead are exact zeros. Numbers outside the range are an error on the CPU only.
    backend: "reference", "cpu", ...; None picks the fastest that supports the call.
    Returns (B, C_out, OH, OW) in channels_last memory, OH = (H + 2 padding - R) // stride + 1.

    Under torch.autocast all floating arguments but fp64 ones are cast, as torch's own convolution does; that includes
    the residual, so a residual stream fused here is in the low precision. Differentiable once. Raises ValueError naming
    argument, value and remedy.
    """
    check_plan(x, plan)
    require_tensors(
        _OPTIONAL,
        weight=weight,
        bias=bias,
        sample_bias=sample_bias,
        residual=residual,
        in_widths=in_widths,
        out_widths=out_widths,
    )
    require_backend_name(backend)
    return _forward_op(
        x,
        weight,
        bias,
        sample_bias,
        residual,
        plan.offsets,
        plan.tiles,
        plan.weight_index,
        in_widths,
        out_widths,
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        backend or "",
    )


@backends.describes("routed_conv2d")
def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    sample_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> ConvProblem:
    check_plan(x, plan)
    require_tensors(
        _OPTIONAL,
        weight=weight,
        bias=bias,
        sample_bias=sample_bias,
        residual=residual,
        in_widths=in_widths,
        out_widths=out_widths,
    )
    routing = (plan.offsets, plan.weight_index, in_widths, out_widths)
    stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
    extras: dict[str, Any] = {"bias": bias, "sample_bias": sample_bias, "residual": residual}
    problem = conv_problem("routed_conv2d", x, x.shape, weight, *routing, stride, padding, tiles=plan.tiles, **extras)
    check_conv_values(problem, *routing)
    return problem


def _pair(values: Any) -> tuple[int, int]:
    """The dispatcher hands lists of ints over as lists; a problem is hashable."""
    return values[0], values[1]


def _run(kernel: Callable[..., Any], problem: ConvProblem, routing: tuple[Any, Any, Any, Any], *args: Any) -> Any:
    """Backends check the numbers that they index with; on a refusal ours says more."""
    try:
        return kernel(problem, *args)
    except ValueError:
        check_conv_values(problem, *routing)
        raise


_WIDTHS_SCHEMA = "Tensor weight_index, Tensor? in_widths, Tensor? out_widths"
_ROUTING_SCHEMA = f"Tensor offsets, {_WIDTHS_SCHEMA}"
_TILED_SCHEMA = f"Tensor offsets, Tensor tiles, {_WIDTHS_SCHEMA}"
_SETTINGS_SCHEMA = "int[2] stride, int[2] padding"


def _forward(
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
    stride: tuple[int, int],
    padding: tuple[int, int],
    backend: str,
) -> Tensor:
    stride, padding = _pair(stride), _pair(padding)
    settings = (stride, padding)
    routing = (offsets, weight_index, in_widths, out_widths)

    def describe() -> ConvProblem:
        extras: dict[str, Any] = {"bias": bias, "sample_bias": sample_bias, "residual": residual}
        return conv_problem("routed_conv2d", x, x.shape, weight, *routing, *settings, tiles=tiles, **extras)

    key = ("conv2d", settings, tf32_is_allowed(), signature(x, weight, bias, sample_bias, residual, tiles, *routing))
    problem, chosen = backends.remembered(key, describe, backend)
    rest = (offsets, tiles, weight_index, in_widths, out_widths)
    return _run(chosen.conv2d, problem, routing, x, weight, bias, sample_bias, residual, *rest)


def _forward_fake(
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
    stride: tuple[int, int],
    padding: tuple[int, int],
    backend: str,
) -> Tensor:
    p = conv_problem(
        "routed_conv2d", x, x.shape, weight, offsets, weight_index, in_widths, out_widths,
        _pair(stride), _pair(padding), tiles=tiles, bias=bias, sample_bias=sample_bias, residual=residual,
    )  # fmt: skip
    return _empty_nhwc(x, p.batch, p.out_channels, p.out_height, p.out_width)


def _empty_nhwc(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


_forward_op = library.define(
    "routed_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? sample_bias, Tensor? residual, "
    f"{_TILED_SCHEMA}, {_SETTINGS_SCHEMA}, str backend) -> Tensor",
    _forward,
    _forward_fake,
)


def _dgrad(
    dy: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    image_size: list[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    backend: str,
) -> Tensor:
    settings = tuple(image_size), _pair(stride), _pair(padding)
    routing = (offsets, weight_index, in_widths, out_widths)

    def describe() -> ConvProblem:
        return _dgrad_problem(dy, weight, routing, tiles, *settings)

    key = ("dgrad", settings, tf32_is_allowed(), signature(dy, weight, tiles, *routing))
    problem, chosen = backends.remembered(key, describe, backend)
    return _run(chosen.conv2d_dgrad, problem, routing, dy, weight, offsets, tiles, weight_index, in_widths, out_widths)


def _dgrad_problem(
    dy: Tensor,
    weight: Tensor,
    routing: tuple[Any, Any, Any, Any],
    tiles: Tensor,
    image_size: Any,
    stride: Any,
    padding: Any,
) -> ConvProblem:
    channels = weight.shape[2] if weight.dim() == 5 else 0
    image = (dy.shape[0], channels, *image_size)
    settings = (_pair(stride), _pair(padding))
    return conv_problem("routed_conv2d_dgrad", dy, image, weight, *routing, *settings, tiles=tiles, dy=dy)


def _dgrad_fake(
    dy: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    image_size: list[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    backend: str,
) -> Tensor:
    routing = (offsets, weight_index, in_widths, out_widths)
    p = _dgrad_problem(dy, weight, routing, tiles, image_size, stride, padding)
    return _empty_nhwc(dy, p.batch, p.in_channels, p.height, p.width)


_dgrad_op = library.define(
    f"routed_conv2d_dgrad(Tensor dy, Tensor weight, {_TILED_SCHEMA}, SymInt[2] image_size, {_SETTINGS_SCHEMA}, "
    "str backend) -> Tensor",
    _dgrad,
    _dgrad_fake,
)


def _wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    stride, padding = _pair(stride), _pair(padding)
    settings = (stride, padding)
    routing = (offsets, weight_index, in_widths, out_widths)

    def describe() -> ConvProblem:
        return conv_problem("routed_conv2d_wgrad", x, x.shape, weight, *routing, *settings, dy=dy)

    key = ("wgrad", settings, tf32_is_allowed(), signature(dy, x, weight, *routing))
    problem, chosen = backends.remembered(key, describe, backend)
    grads = _run(chosen.conv2d_wgrad, problem, routing, dy, x, weight, *routing, tuple(mask))
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _wgrad_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    weight_index: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    p = conv_problem(
        "routed_conv2d_wgrad", x, x.shape, weight, offsets, weight_index, in_widths, out_widths,
        _pair(stride), _pair(padding), dy=dy,
    )  # fmt: skip
    return (
        torch.empty_like(weight) if mask[0] else dy.new_empty(0),
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


class _RoutedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
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
        stride: tuple[int, int],
        padding: tuple[int, int],
        backend: str,
    ) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        ctx.image_size, ctx.settings, ctx.backend = x.shape[2:], (stride, padding), backend
        # Only wgrad reads x.
        ctx.save_for_backward(
            x if needs[1] or needs[2] or needs[3] else None,
            weight,
            offsets,
            tiles,
            weight_index,
            in_widths,
            out_widths,
        )
        with library.below_autograd():
            return run(
                x, weight, bias, sample_bias, residual, offsets, tiles, weight_index, in_widths, out_widths,
                stride, padding, backend,
            )  # fmt: skip

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, tiles, *rest = ctx.saved_tensors
        out_widths = rest[-1]
        needs = ctx.needs_input_grad[1:]
        dx = dweight = dbias = dsample_bias = dresidual = None
        dy = dy.contiguous(memory_format=torch.channels_last)  # once, for dgrad and wgrad
        if needs[0]:
            settings = (ctx.image_size, *ctx.settings, ctx.backend)
            dx = library.call_in_backward(_dgrad_op, dy, weight, offsets, tiles, *rest, *settings)
        if needs[1] or needs[2] or needs[3]:
            mask = needs[1:4]
            settings = (*ctx.settings, mask, ctx.backend)
            grads = library.call_in_backward(_wgrad_op, dy, x, weight, offsets, *rest, *settings)
            dweight, dbias, dsample_bias = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
        if needs[4]:
            dresidual = dy
            if out_widths is not None:
                live = live_channels(out_widths, offsets, dy.shape[0], dy.shape[1])
                dresidual = torch.where(live[:, :, None, None], dy, 0)
        return None, dx, dweight, dbias, dsample_bias, dresidual, *(None,) * 8


def _cast(device_type: str, *args: Any) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 else arg
        for arg in args
    )


library.add_autograd(_forward_op, _RoutedConv2d)
library.add_autocast(_forward_op, _cast)
