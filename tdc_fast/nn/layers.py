"""The dense leaves (layers with parameters) of a denoiser, with the call signatures of their routed twins.

Every leaf is the torch layer of the same name, with the same parameters and state-dict keys. Its `forward` also takes
what the routed operators fuse: a per-sample bias, a residual, a scale and shift, an activation. So a model has one
`forward` for its dense and its routed form; only the leaves differ (`tdc_fast.nn.routed`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tdc_fast.errors import invalid
from tdc_fast.ops.inputs import joined


def group_count(channels: int) -> int:
    """Largest number of normalisation groups that is at most 32 and divides `channels`.

    It is 32 wherever improved-diffusion's GroupNorm(32) is defined; other channel counts work too (8 channels have 8
    groups, 48 have 24).
    """
    return next(groups for groups in range(min(32, channels), 0, -1) if channels % groups == 0)


class Conv2d(nn.Conv2d):
    """Convolution, with an optional second input, nearest upsampling in front, bias per sample and residual."""

    def forward(
        self,
        x: Tensor,
        *,
        x2: Tensor | None = None,
        upsample: int = 1,
        sample_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve, then add what is given.

        Args:
            x: images (B, C_in, H, W); with x2 the first channels of them.
            x2: the last input channels (B, C_2, H, W).
            upsample: 2 doubles height and width first, by repeating pixels.
            sample_bias: bias per sample (B, C_out).
            residual: (B, C_out, OH, OW).

        Returns:
            (B, C_out, OH, OW).
        """
        x = joined(x, x2)
        y = super().forward(x if upsample == 1 else F.interpolate(x, scale_factor=upsample, mode="nearest"))
        if sample_bias is not None:
            y = y + sample_bias[:, :, None, None]
        return y if residual is None else residual + y


class GroupNorm(nn.GroupNorm):
    """Group normalisation with fp32 statistics; an optional second input, scale and shift per sample and SiLU."""

    def forward(
        self,
        x: Tensor,
        *,
        x2: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Compute `activation(norm(x) * (1 + scale) + shift)`.

        Args:
            x: images (B, C, H, W); with x2 the first channels of them.
            x2: the last channels (B, C_2, H, W).
            scale: (B, C).
            shift: (B, C).
            activation: "silu", or None for none.

        Returns:
            (B, C, H, W), in the dtype of x.

        Raises:
            ValueError: for another activation.
        """
        x = joined(x, x2)
        if x.is_meta and not torch.is_grad_enabled():
            return torch.empty_like(x)  # torch derives the shape in Python, in milliseconds, where MACs are counted
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if forward_ad._current_level >= 0:  # torch's forward mode views the input as it is contiguous
            x = x.contiguous()
        # Not F.group_norm, which refuses a single sample with one value per group (1x1 pixels of few channels).
        y = torch.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None])
        if shift is not None:
            y = y + shift[:, :, None, None]
        if activation == "silu":
            return F.silu(y)
        if activation is not None:
            raise invalid("activation", activation, "None or 'silu'")
        return y


class Linear(nn.Linear):
    """Linear layer with an optional residual; `chunks` gives its output in equal parts."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map x (..., C_in) to (..., C_out) and add the residual (..., C_out)."""
        y = super().forward(x)
        return y if residual is None else residual + y

    def chunks(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """The output of x in `count` consecutive blocks of channels, each (..., C_out / count)."""
        return self(x).chunk(count, dim=-1)


class TokenConv1d(nn.Conv1d):
    """A 1x1 Conv1d, weight (C_out, C_in, 1), on tokens (B, T, C_in): a view of channels_last images."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Map x (B, T, C_in) to (B, T, C_out) and add the residual (B, T, C_out)."""
        y = F.linear(x, self.weight.squeeze(-1), self.bias)
        return y if residual is None else residual + y


def to_tokens(x: Tensor) -> Tensor:
    """Images (B, C, H, W) as tokens (B, H*W, C); a view when x is channels_last."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H*W, C) as images (B, C, H, W) in channels_last; a view."""
    batch, _, channels = tokens.shape
    return tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)
