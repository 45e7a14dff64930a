"""routed_linear: the routed convolution of T tokens viewed as an image of T x 1 pixels, without copies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.ops import backends
from tdc_fast.ops.checks import check_memory, require_tensors
from tdc_fast.ops.conv2d import describe as describe_conv2d
from tdc_fast.ops.conv2d import routed_conv2d
from tdc_fast.ops.plan import RoutingPlan


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    *,
    in_widths: Tensor | None = None,
    out_widths: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Applies to every sample the linear layer of its group's expert, in one launch.

    dtypes, autocast, dead channels and gradients are as in `routed_conv2d`.

    Args:
        x: (B, C_in) or (B, T, C_in).
        weight: (E, C_out, C_in).
        bias: (E, C_out) or None.
        plan: The plan that sorted the batch.
        in_widths: int32 (N,), live input channels of each group; None is all.
        out_widths: int32 (N,), live output channels of each group; None is all.
        residual: Shape of the result, or None.
        backend: "reference", "cpu", "triton", "cuda" or "hopper"; None picks the fastest that supports the call.

    Returns:
        (B, C_out) or (B, T, C_out), contiguous.

    Raises:
        ValueError: Naming argument, value and remedy.
    """
    image, filters, added = _as_images(x, weight, residual)
    y = routed_conv2d(
        image,
        filters,
        bias,
        plan,
        in_widths=in_widths,
        out_widths=out_widths,
        residual=added,
        backend=backend,
    )
    # Not an index, whose gradient is a zero-filled copy.
    return y.flatten(1) if x.dim() == 2 else y.squeeze(-1).transpose(1, 2)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    require_tensors(("residual",), x=x, weight=weight, residual=residual)
    if x.dim() not in (2, 3):
        raise invalid("x", tuple(x.shape), "shape (B, C_in) or (B, T, C_in)")
    if weight.dim() != 3:
        raise invalid("weight", tuple(weight.shape), "rank 3: (E, C_out, C_in)")
    if residual is not None and (residual.dim() != x.dim() or residual.shape[:-1] != x.shape[:-1]):
        shape = (*x.shape[:-1], weight.shape[1])
        raise invalid("residual", tuple(residual.shape), f"shape {shape}")


def _as_images(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments, checked, as the convolution takes them."""
    _check(x, weight, residual)
    try:
        filters = weight.view(*weight.shape, 1, 1)
        return _as_image(x), filters, None if residual is None else _as_image(residual)
    except RuntimeError:  # torch refuses to view memory that was freed
        check_memory(x=x, weight=weight, residual=residual)
        raise


def _as_image(x: Tensor) -> Tensor:
    """Views (B, C) as (B, C, 1, 1) and (B, T, C) as (B, C, T, 1), channels_last when x is contiguous."""
    return x.view(*x.shape, 1, 1) if x.dim() == 2 else x.transpose(1, 2).unsqueeze(-1)


@backends.describes("routed_linear")
def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RoutingPlan,
    *,
    residual: Tensor | None = None,
    **rest: Any,
) -> Any:
    image, filters, added = _as_images(x, weight, residual)
    return describe_conv2d(image, filters, bias, plan, residual=added, **rest)
