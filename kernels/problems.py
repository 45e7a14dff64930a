"""What a kernel is asked to compute: the geometry of one routed operator call, and the tensors it reads.

Every backend takes these. A new argument of an operator is a field here, and reaches a backend without a new parameter
in any signature on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """Geometry of one routed convolution; `op` is the registered operator that runs (forward, dgrad or wgrad)."""

    op: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    filter: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    out_height: int
    out_width: int
    num_groups: int
    num_experts: int
    tf32: bool = False  # fp32 products may be rounded to tf32; the CPU backends never do


@dataclass(frozen=True, slots=True)
class NormProblem:
    """Geometry of one routed group norm; `op` is the registered operator that runs (forward or backward)."""

    op: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int
    width: int
    channels: int
    num_norm_groups: int
    eps: float
    silu: bool
    num_groups: int
    num_experts: int

    @property
    def channels_per_group(self) -> int:
        """Channels that share one mean and variance."""
        return self.channels // self.num_norm_groups


Problem = ConvProblem | NormProblem


class ConvTensors(NamedTuple):
    """The tensors of one routed convolution, samples sorted by group.

    The gradients take the same tuple beside dy. dgrad reads neither x nor what the epilogue adds, wgrad neither the
    values of weight nor the epilogue: there these may be None (weight never is: wgrad writes in its layout).
    """

    x: Tensor | None  # (B, C_in, H, W)
    weight: Tensor  # (E, C_out, C_in, R, S)
    bias: Tensor | None  # (E, C_out)
    sample_bias: Tensor | None  # (B, C_out)
    residual: Tensor | None  # (B, C_out, OH, OW)
    offsets: Tensor  # (N + 1,) int32
    tiles: Tensor  # (rows, 3) int32; no rows in host memory
    weight_index: Tensor  # (N,) int32
    in_widths: Tensor | None  # (N,) int32
    out_widths: Tensor | None  # (N,) int32


class NormTensors(NamedTuple):
    """The tensors of one routed group norm, samples sorted by group. The backward takes the same tuple beside dy."""

    x: Tensor  # (B, C, H, W)
    weight: Tensor  # (E, C)
    bias: Tensor  # (E, C)
    scale: Tensor | None  # (B, C)
    shift: Tensor | None  # (B, C)
    offsets: Tensor  # (N + 1,) int32
    weight_index: Tensor  # (N,) int32
    widths: Tensor | None  # (N,) int32
