"""Blocks whose inner channels can be fewer, found by their structure: those of diffusers, and others built like them.

This file needs torch alone: a copy of it is written beside a pruned expert that other programs load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Axis:
    """An axis of one of a block's layers on which its inner channels are.

    Attributes:
        layer: the layer's path within the block.
        dim: "out" or "in".
        copies: how many consecutive blocks of these channels the axis has.
    """

    layer: str
    dim: str
    copies: int = 1


@dataclass(frozen=True)
class Block:
    """What a block is.

    Attributes:
        kind: "resblock", "attention" or "feed_forward".
        channels: its inner channels.
        atom: channels that are kept or removed together: those of one norm group, of one head, or a single channel.
        axes: the axes of its layers that have these channels.
    """

    kind: str
    channels: int
    atom: int
    axes: tuple[Axis, ...]


def block_of(module: nn.Module) -> Block | None:
    """The block that a module is, by the layers in it; None for every other module."""
    return _resblock(module) or _attention(module) or _feed_forward(module)


def _resblock(module: Any) -> Block | None:
    """Norm, convolution, timestep embedding, norm, convolution, and a skip path: `ResnetBlock2D`."""
    conv1, norm, conv2 = (getattr(module, name, None) for name in ("conv1", "norm2", "conv2"))
    if not (isinstance(conv1, nn.Conv2d) and isinstance(norm, nn.GroupNorm) and isinstance(conv2, nn.Conv2d)):
        return None
    channels = conv1.out_channels
    convolutions = conv1.groups == conv2.groups == 1 and channels == norm.num_channels == conv2.in_channels
    if not convolutions or not all(hasattr(module, name) for name in ("conv_shortcut", "output_scale_factor")):
        return None
    axes = [Axis("conv1", "out"), Axis("norm2", "out"), Axis("conv2", "in")]
    embedding, how = getattr(module, "time_emb_proj", None), getattr(module, "time_embedding_norm", "default")
    if embedding is not None:
        copies = {"default": 1, "scale_shift": 2}.get(how, 0)
        if not isinstance(embedding, nn.Linear) or embedding.out_features != copies * channels:
            return None
        axes.append(Axis("time_emb_proj", "out", copies))
    return Block("resblock", channels, channels // norm.num_groups, tuple(axes))


def _attention(module: Any) -> Block | None:
    """Attention with a linear layer for each of q, k and v: `Attention`, for self- and for cross-attention."""
    layers: list[Any] = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
    out: Any = getattr(module, "to_out", None)
    if not isinstance(out, nn.ModuleList | nn.Sequential) or not len(out):
        return None
    closing: Any = out[0]
    heads = getattr(module, "heads", None)
    if not all(isinstance(layer, nn.Linear) for layer in (*layers, closing)) or not isinstance(heads, int):
        return None
    channels: int = closing.in_features
    if not heads or channels % heads or any(layer.out_features != channels for layer in layers):
        return None
    if closing.out_features != layers[0].in_features:
        return None
    size = channels // heads
    norms = [getattr(module, name, None) for name in ("norm_q", "norm_k")]
    if any(norm is not None and any(p.numel() != size for p in norm.parameters()) for norm in norms):
        return None  # a norm across the heads
    others = ("add_q_proj", "add_k_proj", "add_v_proj", "to_qkv", "to_kv")  # the last two of `fuse_qkv_projections()`
    if any(getattr(module, name, None) is not None for name in others):
        return None
    axes = [Axis(name, "out") for name in ("to_q", "to_k", "to_v")] + [Axis("to_out.0", "in")]
    return Block("attention", channels, size, tuple(axes))


def _feed_forward(module: Any) -> Block | None:
    """A linear layer with an activation, gated or not, dropout, and a linear layer: `FeedForward`."""
    net: Any = getattr(module, "net", None)
    if not isinstance(net, nn.ModuleList | nn.Sequential) or len(net) < 2:
        return None
    parts: list[Any] = list(net)
    first = getattr(parts[0], "proj", None)
    at, last = next(((i, part) for i, part in enumerate(parts) if isinstance(part, nn.Linear)), (0, None))
    if not isinstance(first, nn.Linear) or last is None or any(list(part.parameters()) for part in parts[1:at]):
        return None
    copies, rest = divmod(first.out_features, last.in_features)
    if rest or copies not in (1, 2) or last.out_features != first.in_features:
        return None
    axes = (Axis("net.0.proj", "out", copies), Axis(f"net.{at}", "in"))
    return Block("feed_forward", last.in_features, 1, axes)


def narrow(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Cuts the blocks of a model to their first inner channels, in place; so sort the channels before, if it matters.

    Args:
        model: the dense model.
        widths: channels by the block's path. At 0 only the block's skip path is left.
    """
    for path, width in widths.items():
        module = model.get_submodule(path)
        block = block_of(module)
        if block is None or not 0 <= width <= block.channels or width % block.atom:
            raise ValueError(f"widths[{path!r}]: got {width}; expected a width that this block can have")
        for axis in block.axes if width else ():
            _cut(module.get_submodule(axis.layer), axis.dim, width * axis.copies)
        set_width(model, path, width, block.atom)


def set_width(model: nn.Module, path: str, width: int, atom: int) -> None:
    """Tells a block, whose layers have been cut, how many inner channels it has; at 0 it becomes its skip path."""
    module: Any = model.get_submodule(path)
    if not width:
        parent, _, name = path.rpartition(".")
        skip = SkipPath(module) if hasattr(module, "output_scale_factor") else NoChange(module)
        setattr(model.get_submodule(parent), name, skip.train(module.training))
    elif hasattr(module, "to_q"):
        module.heads = width // atom
        for name in ("inner_dim", "inner_kv_dim"):
            if hasattr(module, name):
                setattr(module, name, width)
        if hasattr(module, "sliceable_head_dim"):
            module.sliceable_head_dim = module.heads


def _cut(layer: Any, dim: str, size: int) -> None:
    """Keeps the first `size` output or input channels of a layer."""
    axis = 0 if dim == "out" else 1
    layer.weight = _first(layer.weight, axis, size)
    if dim == "out" and layer.bias is not None:
        layer.bias = _first(layer.bias, 0, size)
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups, layer.num_channels = size * layer.num_groups // layer.num_channels, size
    else:
        setattr(layer, f"{dim}_{'features' if isinstance(layer, nn.Linear) else 'channels'}", size)


def _first(parameter: Tensor, axis: int, size: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().narrow(axis, 0, size).clone(), parameter.requires_grad)


class SkipPath(nn.Module):
    """A residual block without inner channels: resampling and the 1x1 convolution that it has beside them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.upsample, self.downsample = getattr(block, "upsample", None), getattr(block, "downsample", None)
        self.conv_shortcut, self.scale = block.conv_shortcut, block.output_scale_factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The skip path of the first argument (B, C, H, W); the others are ignored."""
        x = _first_of(args, kwargs)
        resample = self.upsample or self.downsample
        x = x if resample is None else resample(x)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x / self.scale


class NoChange(nn.Module):
    """A block without inner channels, whose result is added to a residual: zeros, or the residual it adds itself."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.residual = getattr(block, "residual_connection", False)
        self.scale = getattr(block, "rescale_output_factor", 1.0)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros like the first argument, or itself where the block adds it; the others are ignored."""
        x = _first_of(args, kwargs)
        return x / self.scale if self.residual else torch.zeros_like(x)


def _first_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a block changes: its first argument, which some callers name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
