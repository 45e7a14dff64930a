"""The joined or upsampled input of an operator, for kernels that do not read it from its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def joined(x: Tensor, x2: Tensor | None) -> Tensor:
    """The input as one tensor: x (B, C_1, H, W), then x2 (B, C_2, H, W) where there is one."""
    return x if x2 is None else torch.cat([x, x2], dim=1)


def upsampled(x: Tensor) -> Tensor:
    """Every pixel of x (B, C, H, W) as 2 x 2, channels_last where x is."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def split_channels(dx: Tensor, x2_channels: int) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and x2 from that of `joined`, dense channels_last; None where there is no x2."""
    if not x2_channels:
        return dx, None
    parts = dx.split([dx.shape[1] - x2_channels, x2_channels], dim=1)
    first, second = (part.contiguous(memory_format=torch.channels_last) for part in parts)
    return first, second
