"""Memory orders that kernels require: NHWC activations, channel-innermost weights, 16-byte aligned addresses."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors

_Tensors = TypeVar("_Tensors", ConvTensors, NormTensors)
_NHWC = torch.channels_last
_ALIGNMENT = 16  # bytes: of one vector load, and of a TMA address


def channel_innermost(weight: Tensor) -> Tensor:
    """Returns weight (E, C_out, C_in, R, S) in memory order [E, C_out, R, S, C_in], copied only where necessary.

    Shape and values do not change. Dense 1x1 filters and single input channels are always in this order.
    """
    if is_channel_innermost(weight):
        return weight
    return weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def is_channel_innermost(weight: Tensor) -> bool:
    """Whether the memory order of weight (E, C_out, C_in, R, S) is [E, C_out, R, S, C_in], dense."""
    return weight.permute(0, 1, 3, 4, 2).is_contiguous()


def empty_channel_innermost(
    shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Uninitialised weight of shape (E, C_out, C_in, R, S) in memory order [E, C_out, R, S, C_in]."""
    experts, out_channels, in_channels, rows, columns = shape
    memory = torch.empty((experts, out_channels, rows, columns, in_channels), dtype=dtype, device=device)
    return memory.permute(0, 1, 4, 2, 3)


def nhwc(x: Tensor) -> Tensor:
    """Returns x (B, C, H, W) in dense memory of order [B, H, W, C], copied only where necessary."""
    return x.contiguous(memory_format=_NHWC)


def empty_nhwc(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised images of shape (B, C, H, W) in memory order [B, H, W, C], with the dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_NHWC)


def empty_wgrad(
    p: ConvProblem, weight: Tensor, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a wgrad returns, uninitialised, or zeros where the batch is empty, so that no kernel runs.

    Args:
        p: The problem.
        weight: The weight, (E, C_out, C_in, R, S).
        mask: Which of the gradients are wanted.

    Returns:
        dweight in the strides of weight, dbias (E, C_out), dsample_bias (B, C_out); None where unmasked.
    """
    make, like = (torch.empty, torch.empty_like) if p.batch else (torch.zeros, torch.zeros_like)
    return (
        like(weight) if mask[0] else None,
        make((p.num_experts, p.out_channels), dtype=p.dtype, device=weight.device) if mask[1] else None,
        make((p.batch, p.out_channels), dtype=p.dtype, device=weight.device) if mask[2] else None,
    )


def empty_norm_gradients(p: NormProblem, dy: Tensor, mask: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """What the backward of a group norm returns, uninitialised, or zeros where the batch is empty.

    Args:
        p: The problem.
        dy: The gradient of the result.
        mask: Which of the gradients are wanted, in their order.

    Returns:
        dx (B, C - C_2, H, W), dweight and dbias (E, C), dscale and dshift (B, C), dx2 (B, C_2, H, W); None where
        unmasked. Images are channels_last.
    """
    make = torch.empty if p.batch else torch.zeros
    dx, dx2 = (
        empty_nhwc(dy, p.batch, channels, p.height, p.width) if wanted else None
        for channels, wanted in ((p.channels - p.x2_channels, mask[0]), (p.x2_channels, mask[5]))
    )
    rows = (p.num_experts, p.num_experts, p.batch, p.batch)
    affine = (
        make((count, p.channels), dtype=p.dtype, device=dy.device) if wanted else None
        for count, wanted in zip(rows, mask[1:5], strict=True)
    )
    return dx, *affine, dx2


def dense(t: _Tensors) -> _Tensors:
    """Returns the same tensors, contiguous: images (B, C, H, W) as `nhwc`, weights (E, C_out, C_in, R, S) unchanged."""
    return type(t)._make(
        [
            x
            if x is None or (rank := x.ndim) == 5
            else x.contiguous(memory_format=_NHWC)
            if rank == 4
            else x.contiguous()
            for x in t
        ]
    )


def aligned(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy where its address is not a multiple of 16."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
