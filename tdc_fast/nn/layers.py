"""The dense leaves a denoiser is built of, with the call signatures of their routed twins.

Every leaf is the torch layer of the same name (same parameters, same state-dict keys) whose ``forward`` also takes what
the routed operators fuse: a per-sample bias, a residual, a scale and shift, an activation. One model forward then
serves the dense model and the routed one; only the leaves differ (``tdc_fast.nn.routed``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.errors import invalid


def group_count(channels: int, limit: int = 32) -> int:
    """Largest number of normalisation groups that is at most ``limit`` and divides ``channels``.

    It is 32 wherever improved-diffusion's GroupNorm(32) is defined, and lets any other channel count work (8 -> 8
    groups, 48 -> 24 groups).
    """
    return next(groups for groups in range(min(limit, channels), 0, -1) if channels % groups == 0)


class Conv2d(nn.Conv2d):
    """Convolution, plus a bias per sample, plus a residual."""

    def forward(self, x: Tensor, *, sample_bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x (B, C_in, H, W), sample_bias (B, C_out), residual (B, C_out, OH, OW) -> (B, C_out, OH, OW)."""
        y = super().forward(x)
        if sample_bias is not None:
            y = y + sample_bias[:, :, None, None]
        return y if residual is None else residual + y


class GroupNorm(nn.GroupNorm):
    """Group normalisation with fp32 statistics, plus a per-sample scale and shift, plus SiLU."""

    def forward(
        self,
        x: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """x (B, C, H, W), scale and shift (B, C): ``act(norm(x) * (1 + scale) + shift)``, in x's dtype."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
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
    """Linear layer, plus a residual; its output may be asked for in equal chunks."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """x (..., C_in), residual (..., C_out) -> (..., C_out)."""
        y = super().forward(x)
        return y if residual is None else residual + y

    def chunks(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """The output's channels in ``count`` consecutive blocks, each (..., C_out / count)."""
        return self(x).chunk(count, dim=-1)


class TokenConv1d(nn.Conv1d):
    """A 1x1 Conv1d (weight (C_out, C_in, 1)) applied to tokens (B, T, C_in): NHWC activations, used in place."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """x (B, T, C_in), residual (B, T, C_out) -> (B, T, C_out)."""
        y = F.linear(x, self.weight.squeeze(-1), self.bias)
        return y if residual is None else residual + y


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view when x is channels_last."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) in channels_last; a view."""
    batch, _, channels = tokens.shape
    return tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)


def qkv_attention(qkv: Tensor, head_dim: int, live: Tensor | None = None) -> Tensor:
    """Self-attention over head-major channels (improved-diffusion's QKVAttention), softmax in fp32.

    qkv (B, T, heads * 3 * head_dim), each head's channels being its q, k and v -> (B, T, heads * head_dim). Scores are
    scaled by head_dim ** -0.5 (there: its square root on q and on k). On a GPU torch's fused attention does the same;
    elsewhere batched products do, because torch's FLOP counter does not see its fused CPU kernel. ``live`` (B, heads)
    bool: heads that a sample does without are not computed on the CPU, their output is zero.
    """
    batch, tokens, channels = qkv.shape
    heads = channels // (3 * head_dim)
    # one copy gives all three in the layout of the batched products; each is (B * heads, T, head_dim)
    split = qkv.view(batch, tokens, heads, 3, head_dim).permute(3, 0, 2, 1, 4)
    if live is not None and not qkv.is_cuda and not torch.compiler.is_compiling():
        sample, head = live.nonzero(as_tuple=True)  # the only size that depends on data; free on the CPU
        out = _attend(split[:, sample, head], head_dim)
        out = out.new_zeros(batch, heads, tokens, head_dim).index_put((sample, head), out)
        return out.transpose(1, 2).reshape(batch, tokens, heads * head_dim)
    out = _attend(split.reshape(3, batch * heads, tokens, head_dim), head_dim)
    return out.view(batch, heads, tokens, head_dim).transpose(1, 2).reshape(batch, tokens, heads * head_dim)


def _attend(qkv: Tensor, head_dim: int) -> Tensor:
    """qkv (3, heads of all samples, T, head_dim) -> (heads of all samples, T, head_dim)."""
    q, k, v = qkv.unbind(0)
    if qkv.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    scores = torch.bmm(q * head_dim**-0.5, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores.float(), dim=-1).to(v.dtype), v)
