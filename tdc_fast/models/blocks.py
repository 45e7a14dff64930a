"""The blocks of improved-diffusion's UNet: residual block, attention, resampling, timestep embedding.

A block whose unit is pruned to width 0 is only its skip path. Leaves are called with what the routed operators fuse
(biases, residuals, scale and shift, activations), so dense and routed models have the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.attention import picks_heads, qkv_attention
from tdc_fast.nn.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    TokenConv1d,
    from_tokens,
    group_count,
    to_tokens,
)
from tdc_fast.nn.one_input import chunks_in_one_launch
from tdc_fast.nn.plan_scope import UsesPlan, checkpoint
from tdc_fast.nn.units import PruningUnit, UnitSlice, width_step
from tdc_fast.ops import reads_two_inputs
from tdc_fast.ops.inputs import joined


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (B,), cosines first: fp32 (B, dim), the last column of an odd dim being 0."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def silu(x: Tensor) -> Tensor:
    """SiLU of embeddings, each element's bits independent of where it stands.

    torch's own on the CPU computes what is left over from whole vectors in another way, so that a sample's bits would
    depend on its place in the batch. Its exponential does not. Below -80 the result is that at -80, about -1e-33.

    Args:
        x: any shape, floating point.

    Returns:
        Like x.
    """
    if x.is_cuda:
        return F.silu(x)
    value = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=-80)
    return (value / (1 + torch.exp(-value))).to(x.dtype)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer itself, its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int, groups: int | None = None) -> GroupNorm:
    """A `GroupNorm` with improved-diffusion's number of groups, unless `groups` is given."""
    return GroupNorm(groups or group_count(channels), channels)


class ResBlock(UsesPlan, nn.Module):
    """Residual block with the timestep embedding between its two convolutions.

    It computes norm, SiLU, convolution; adds the embedding, or applies it as scale and shift of the second norm; then
    norm, SiLU, dropout, convolution, and adds the skip path.

    Attributes:
        width: channels between the two convolutions: `out_channels` unless pruned, in whole normalisation groups. At
            width 0 the block is only its skip path.
        atom: channels of one normalisation group.
        routing: holds the plan of the running forward in a routed model.
    """

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, dropout: float, use_checkpoint: bool,
        use_scale_shift_norm: bool, width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width = out_channels if width is None else width
        self.out_channels, self.width = out_channels, width
        self.atom = out_channels // group_count(out_channels)
        self.use_checkpoint, self.use_scale_shift_norm = use_checkpoint, use_scale_shift_norm
        if width:
            emb_width = 2 * width if use_scale_shift_norm else width
            self.in_layers = nn.Sequential(group_norm(channels), nn.SiLU(), Conv2d(channels, width, 3, padding=1))
            self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_channels, emb_width))
            self.out_layers = nn.Sequential(
                group_norm(width, width // self.atom), nn.SiLU(), nn.Dropout(dropout),
                zeroed(Conv2d(width, out_channels, 3, padding=1)),
            )  # fmt: skip
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv2d(channels, out_channels, 1)

    def become_skip(self) -> None:
        """Drop everything but the skip path: width 0."""
        del self.in_layers, self.emb_layers, self.out_layers
        self.width = 0

    @property
    def emb_chunks(self) -> int:
        """Parts of the embedding's linear layer: scale and shift, or the bias alone."""
        return 2 if self.use_scale_shift_norm else 1

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None, embedded: tuple[Tensor, ...] = ()) -> Tensor:
        """Compute the block.

        Args:
            x: (B, C_in, H, W); with skip the first channels of it.
            emb: the embedding after its SiLU, (B, emb_channels).
            skip: the last input channels (B, C_skip, H, W): what an input block left for an output block.
            embedded: the chunks of the embedding's linear layer, (B, width) each, where they were computed already.

        Returns:
            (B, C_out, H, W).
        """
        if skip is not None and (self.routing is None or not reads_two_inputs(x.device, x.dtype)):
            x, skip = joined(x, skip), None  # once for the norm and the skip path
        if not self.width:
            return self._skip_path(x, skip)
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, self.routing, x, emb, skip, *embedded, random=self._drops())
        return self._forward(x, emb, skip, *embedded)

    def _drops(self) -> bool:
        dropout = self.out_layers[2]
        return isinstance(dropout, nn.Dropout) and dropout.p > 0

    def _skip_path(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if isinstance(self.skip_connection, nn.Identity):
            return joined(x, skip)
        return self.skip_connection(x, x2=skip)

    def _forward(self, x: Tensor, emb: Tensor, skip: Tensor | None, *embedded: Tensor) -> Tensor:
        norm_in, _, conv_in = self.in_layers
        norm_out, _, dropout, conv_out = self.out_layers
        embedded = embedded or self.emb_layers[1].chunks(emb, self.emb_chunks)  # type: ignore[operator]
        h = norm_in(x, x2=skip, activation="silu")
        if self.use_scale_shift_norm:
            h = conv_in(h)
            scale, shift = (part.to(h.dtype) for part in embedded)
            h = norm_out(h, scale=scale, shift=shift, activation="silu")
        else:
            h = conv_in(h, sample_bias=embedded[0].to(h.dtype))
            h = norm_out(h, activation="silu")
        return conv_out(dropout(h), residual=self._skip_path(x, skip))

    def pruning_unit(self, name: str) -> PruningUnit:
        """The inner width as a pruning unit, in whole normalisation groups and, where possible, 8 channels."""
        slices = (
            UnitSlice(f"{name}.in_layers.2", "out"),
            UnitSlice(f"{name}.emb_layers.1", "out", copies=self.emb_chunks),
            UnitSlice(f"{name}.out_layers.0", "out"),
            UnitSlice(f"{name}.out_layers.3", "in"),
        )
        return PruningUnit(name, "resblock", self.width, self.atom, width_step(self.width, self.atom), slices)


def head_dim(channels: int, num_heads: int, argument: str = "num_heads") -> int:
    """Channels per attention head. ValueError, naming the argument, unless the heads divide the channels."""
    if num_heads < 1 or channels % num_heads:
        raise invalid(argument, num_heads, f"a divisor of the {channels} channels of the attention")
    return channels // num_heads


class AttentionBlock(UsesPlan, nn.Module):
    """Residual self-attention over all positions.

    Attributes:
        width: channels of all heads together; at width 0 the block is the identity.
        head_dim: channels per head.
        routing: holds the plan of the running forward in a routed model.
    """

    def __init__(self, channels: int, num_heads: int, use_checkpoint: bool, width: int | None = None) -> None:
        super().__init__()
        width = channels if width is None else width
        self.width, self.head_dim, self.use_checkpoint = width, head_dim(channels, num_heads), use_checkpoint
        if width:
            self.norm = group_norm(channels)
            self.qkv = TokenConv1d(channels, 3 * width)
            self.proj_out = zeroed(TokenConv1d(width, channels))

    def become_skip(self) -> None:
        """Drop everything but the skip path: no heads."""
        del self.norm, self.qkv, self.proj_out
        self.width = 0

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block: (B, C, H, W) -> (B, C, H, W)."""
        if not self.width:
            return x
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, self.routing, x, random=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(to_tokens(self.norm(x)))
        h = qkv_attention(qkv, self.head_dim, self._live_heads())
        return from_tokens(self.proj_out(h, residual=to_tokens(x)), x.shape[2], x.shape[3])

    def _live_heads(self) -> Tensor | None:
        """Which heads each sample of the running plan has, bool (B, heads); None where all have all or are computed."""
        widths = getattr(self.qkv, "out_widths", None)
        if widths is None or self.routing is None or self.routing.plan is None or not picks_heads(widths.device):
            return None
        heads = torch.arange(self.width // self.head_dim, device=widths.device)
        return heads < widths[self.routing.plan.groups, None] // (3 * self.head_dim)

    def pruning_unit(self, name: str) -> PruningUnit:
        """The heads as a pruning unit."""
        slices = (UnitSlice(f"{name}.qkv", "out", scale=3), UnitSlice(f"{name}.proj_out", "in"))
        return PruningUnit(name, "attention", self.width, self.head_dim, self.head_dim, slices)


class Downsample(nn.Module):
    """Halves the resolution: a convolution of stride 2, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the resolution: (B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels; with `use_conv` a convolution follows."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """Double the resolution: (B, C, H, W) -> (B, C, 2H, 2W)."""
        if self.conv is None:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x, upsample=2)


class TimestepBlocks(nn.Sequential):
    """A sequence of layers; its ResBlocks also get the timestep embedding."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, embedded: Iterator[tuple[Tensor, ...]], skip: Tensor | None = None
    ) -> Tensor:
        """Run the layers over x (B, C, H, W) with the embedding emb (B, emb_channels).

        The first layer, a ResBlock if there is a skip (B, C_skip, H, W), reads x and skip as one channel axis. Each
        ResBlock that is more than its skip path takes the next of `embedded` (see `embedded_in_one_launch`).
        """
        for layer in self:
            if not isinstance(layer, ResBlock):
                x = layer(x)
                continue
            x, skip = layer(x, emb, skip, next(embedded) if layer.width else ()), None
        return x


def embedded_in_one_launch(blocks: Iterable[TimestepBlocks], emb: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What the linear layers of all ResBlocks make of the embedding, in the order in which they run.

    Args:
        blocks: all of the network, in order.
        emb: the embedding after its SiLU, (B, emb_channels).

    Returns:
        The chunks of each layer; nothing for each where every ResBlock had better compute its own.
    """
    res_blocks = [layer for block in blocks for layer in block if isinstance(layer, ResBlock) and layer.width]
    layers: list[Any] = [block.emb_layers[1] for block in res_blocks]
    found = chunks_in_one_launch(layers, emb, res_blocks[0].emb_chunks) if res_blocks else None
    return repeat(()) if found is None else iter(found)
