"""The registered operators behind routed_linear: those of the convolution, of T tokens as an image of T x 1 pixels.

    tdc_fast::routed_linear    tdc_fast::routed_linear_dgrad    tdc_fast::routed_linear_wgrad

The convolution's functions check views of the tensors and choose what computes them. The operators are apart from the
convolution's so that a call like an earlier one makes no view, and autograd records one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.ops import call_cache, library
from tdc_fast.ops import conv2d_operators as conv2d
from tdc_fast.ops.checks import check_memory
from tdc_fast.ops.dead_channels import are_zeros, note_zeros

_SETTINGS = (1, 1), (0, 0), 1  # stride, padding, upsampling


def image_of(name: str, tokens: Tensor) -> Tensor:
    """Views (B, C) as (B, C, 1, 1) and (B, T, C) as (B, C, T, 1), channels_last when the tokens are contiguous.

    No backend takes an image without pixels: T = 0 gives the image of one token, which is zero.
    """
    if tokens.dim() not in (2, 3):
        raise invalid(name, tuple(tokens.shape), "shape (B, C) or (B, T, C)")
    if tokens.dim() == 2:
        return _view(name, tokens, lambda t: t[:, :, None, None])
    if not tokens.shape[1]:
        tokens = F.pad(tokens, (0, 0, 0, 1))
    return _view(name, tokens, lambda t: t.permute(0, 2, 1).unsqueeze(-1))


def _tokens_of(image: Tensor, like: Tensor) -> Tensor:
    """The view that `image_of` was made from, of the rank of `like`."""
    if like.dim() == 2:
        return image[:, :, 0, 0]
    tokens = image[..., 0].permute(0, 2, 1)
    return tokens if like.shape[1] else tokens[:, :0]


def _filters(weight: Tensor) -> Tensor:
    if weight.dim() != 3:
        raise invalid("weight", tuple(weight.shape), "rank 3: (E, C_out, C_in)")
    return _view("weight", weight, lambda t: t[..., None, None])


def _view(name: str, tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A view of a tensor, or ValueError where its memory was freed."""
    try:
        return make(tensor)
    except RuntimeError:  # torch refuses
        check_memory(**{name: tensor})
        raise


def _images(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """The forward's arguments as the convolution's forward takes them."""
    *routing, backend = rest
    image, filters = image_of("x", x), _filters(weight)
    experts, channels, in_channels = weight.shape
    if not x.shape[-1]:
        raise invalid("x", tuple(x.shape), "at least 1 channel")
    if not (experts and channels):
        raise invalid("weight", tuple(weight.shape), "E and C_out of at least 1")
    if in_channels != x.shape[-1]:
        raise invalid("weight", tuple(weight.shape), f"C_in to be the {x.shape[-1]} channels of x")
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], channels):
        raise invalid("residual", tuple(residual.shape), f"shape {(*x.shape[:-1], channels)}")
    added = None if residual is None else image_of("residual", residual)
    return image, filters, bias, None, added, None, *routing, *_SETTINGS, backend


def _images_of_dgrad(dy: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    *routing, dead_zeros, backend = rest
    image = image_of("dy", dy)
    return image, _filters(weight), *routing, (image.shape[2], 1), 0, *_SETTINGS, dead_zeros, backend


def _images_of_wgrad(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    *routing, mask, backend = rest
    filters = _filters(weight)
    return image_of("dy", dy), image_of("x", x), None, filters, *routing, *_SETTINGS, (*mask, False), backend


def _weight_gradient(grads: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias from the convolution's; those that are not asked for are empty, of rank 1."""
    dweight, dbias, _ = grads
    return dweight if dweight.dim() == 1 else dweight[..., 0, 0], dbias


def _operator(
    of_images: call_cache.Operator, schema: str, images: Callable[..., tuple[Any, ...]], results: Callable[..., Any]
) -> call_cache.Operator:
    """Registers an operator on tokens.

    Args:
        of_images: The operator on images that computes it.
        schema: Its own.
        images: From its arguments to those of `of_images`.
        results: From what that returns, and its arguments, to its results.
    """

    def bind(*args: Any) -> call_cache.Bound:
        bound = of_images.bind(*images(*args))

        def run(*args: Any) -> Any:
            found = results(bound.run(*images(*args)), *args)
            # To torch no view of another tensor: it refuses to write to a view that a node of its graph returned.
            return found.data if isinstance(found, Tensor) else tuple([grad.data for grad in found])

        return call_cache.Bound(run, bound.only_launches)

    def fake(*args: Any) -> Any:
        return results(of_images.fake(*images(*args)), *args)

    return call_cache.Operator(schema, bind, fake)


forward = _operator(
    conv2d.forward,
    "routed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
    f"{conv2d.TILED_SCHEMA}, str backend) -> Tensor",
    _images,
    lambda y, x, *_: _tokens_of(y, x),
)
dgrad = _operator(
    conv2d.dgrad,
    f"routed_linear_dgrad(Tensor dy, Tensor weight, {conv2d.TILED_SCHEMA}, bool dead_zeros, str backend) -> Tensor",
    _images_of_dgrad,
    lambda grads, dy, *_: _tokens_of(grads[0], dy),
)
wgrad = _operator(
    conv2d.wgrad,
    f"routed_linear_wgrad(Tensor dy, Tensor x, Tensor weight, {conv2d.ROUTING_SCHEMA}, bool[2] mask, str backend) "
    "-> (Tensor, Tensor)",
    _images_of_wgrad,
    _weight_gradient,
)


def forward_problem(*args: Any) -> ConvProblem:
    """The problem of the forward's arguments but `backend`; raises the ValueErrors that the forward would raise."""
    return conv2d.forward_problem(*_images(*args, "")[:-1])


def _save(ctx: Any, args: tuple[Any, ...], y: Tensor) -> None:
    x, weight, _, _, *routing, ctx.backend = args
    only_wgrad_reads_x = any(ctx.needs_input_grad[1:3])
    ctx.save_for_backward(x if only_wgrad_reads_x else None, weight, *routing)


@library.once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, tiles, *widths = ctx.saved_tensors
    out_widths, needs = widths[-1], ctx.needs_input_grad
    dx = dweight = dbias = dresidual = None
    mask = needs[1:3]
    dead_zeros = are_zeros(dy, out_widths, offsets)
    dy = conv2d.dense_gradient(dy, torch.contiguous_format, needs[0] or any(mask), offsets, out_widths)
    if needs[0]:
        dx = dgrad.call(dy, weight, offsets, tiles, *widths, dead_zeros, ctx.backend)
        note_zeros(dx, widths[-2], offsets)
    if any(mask):
        grads = wgrad.call(dy, x, weight, offsets, *widths, mask, ctx.backend)
        dweight, dbias = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    if needs[3]:
        live = dead_zeros or out_widths is None
        dresidual = dy if live else _tokens_of(conv2d.live_part(image_of("dy", dy), offsets, out_widths), dy)
    return dx, dweight, dbias, dresidual, *(None,) * 6


def _tangent(args: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The layer is linear in the input and weight each, and in the rest together."""
    x, weight = args[:2]
    dx, dweight, *dadded = tangents[:4]
    rest = args[4:]
    if dweight is None:
        return forward.overload(torch.zeros_like(x) if dx is None else dx, weight, *dadded, *rest)
    along_weight = forward.overload(x, dweight, *dadded, *rest)
    return along_weight if dx is None else along_weight + forward.overload(dx, weight, None, None, *rest)


forward.add_autograd(_save, _backward, _tangent)
forward.add_autocast(conv2d.cast_all(forward))
