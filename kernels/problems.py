"""What a kernel is asked to compute: the geometry of one routed operator call, and the tensors it reads.

Every backend takes these. A new argument of an operator becomes a field here, and reaches the backends without a new
parameter in any signature on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """Geometry of one routed convolution; `op` is the registered operator that runs (forward, dgrad or wgrad).

    `height` and `width` are those of x, before upsampling; `in_channels` are those of x and x2 together.
    """

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
    x2_channels: int = 0  # the last input channels, which x2 holds; 0: there is no x2
    upsample: int = 1  # 2: every pixel of the input stands for 2 x 2
    dead_zeros: bool = False  # of a dgrad: whether dy is known to be zero past the widths

    def refusal(self) -> str | None:
        """Why no kernel serves the filter or the stride, on whatever device; None where they are served."""
        if self.filter[0] % 2 == 0 or self.filter[1] % 2 == 0:
            return f"it has odd filters, not {self.filter}"
        return f"it has strides 1 and 2, not {self.stride}" if max(self.stride) > 2 else None

    @property
    def fused(self) -> tuple[str, ...]:
        """What is fused into reading the input: "x2", "upsample"."""
        return ("x2",) * (self.x2_channels > 0) + ("upsample",) * (self.upsample > 1)

    def unfused(self) -> ConvProblem:
        """The problem once x and x2 are one tensor of its final size."""
        height, width = self.height * self.upsample, self.width * self.upsample
        return replace(self, x2_channels=0, upsample=1, height=height, width=width)

    def adjoint(self) -> ConvProblem:
        """The convolution of stride 2 whose dgrad is this one, which upsamples (one input, stride 1, padding < filter).

        Its filter is one larger: tap k holds the sum of taps R - 1 - k and R - k of this one, those that meet a pixel.
        """
        (rows, columns), (pad_h, pad_w) = self.filter, self.padding
        return replace(
            self,
            height=self.out_height,
            width=self.out_width,
            in_channels=self.out_channels,
            out_channels=self.in_channels,
            filter=(rows + 1, columns + 1),
            stride=(2, 2),
            padding=(rows - 1 - pad_h, columns - 1 - pad_w),
            out_height=self.height,
            out_width=self.width,
            upsample=1,
        )


@dataclass(frozen=True, slots=True)
class NormProblem:
    """Geometry of one routed group norm; `op` is the registered operator that runs (forward or backward).

    `channels` are those of x and x2 together.
    """

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
    x2_channels: int = 0  # the last channels, which x2 holds; 0: there is no x2

    @property
    def fused(self) -> tuple[str, ...]:
        """What is fused into reading the input: "x2"."""
        return ("x2",) * (self.x2_channels > 0)

    def unfused(self) -> NormProblem:
        """The problem once x and x2 are one tensor."""
        return replace(self, x2_channels=0)

    @property
    def channels_per_group(self) -> int:
        """Channels that share one mean and variance."""
        return self.channels // self.num_norm_groups


Problem = ConvProblem | NormProblem


class ConvTensors(NamedTuple):
    """The tensors of one routed convolution, samples sorted by group.

    Every pass takes this tuple; the gradients take dy as well. In dgrad x and x2 are None and in wgrad tiles is,
    although their types do not say so. The gradients do not use the epilogue's tensors.

    Attributes:
        x: input, (B, C_in, H, W); with x2 the first channels of it.
        weight: (E, C_out, C_in, R, S). wgrad reads its shape and strides only.
        offsets: int32 (N + 1,), first sample of each group.
        tiles: int32 (rows, 3), the tile table (tile_table.py); no rows in host memory.
        weight_index: int32 (N,), expert of each group.
        in_widths: int32 (N,), live input channels of each group, or None.
        out_widths: int32 (N,), live output channels of each group, or None.
        bias: epilogue, (E, C_out) or None.
        sample_bias: epilogue, (B, C_out) or None.
        residual: epilogue, (B, C_out, OH, OW) or None.
        x2: the last input channels, (B, C_2, H, W), or None.
    """

    x: Tensor
    weight: Tensor
    offsets: Tensor
    tiles: Tensor
    weight_index: Tensor
    in_widths: Tensor | None = None
    out_widths: Tensor | None = None
    bias: Tensor | None = None
    sample_bias: Tensor | None = None
    residual: Tensor | None = None
    x2: Tensor | None = None


class NormTensors(NamedTuple):
    """The tensors of one routed group norm, samples sorted by group. The backward takes dy as well.

    Attributes:
        x: input, (B, C, H, W); with x2 the first channels of it.
        weight: (E, C).
        bias: (E, C).
        offsets: int32 (N + 1,), first sample of each group.
        weight_index: int32 (N,), expert of each group.
        widths: int32 (N,), live channels of each group, or None.
        scale: (B, C) or None.
        shift: (B, C) or None.
        x2: the last channels, (B, C_2, H, W), or None.
        counters: int32 (E, norm groups), zeros, of which the backward's programs count what they have done; it leaves
            zeros. The forward makes it; None there, and where a backward has to do without.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    offsets: Tensor
    weight_index: Tensor
    widths: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    x2: Tensor | None = None
    counters: Tensor | None = None
