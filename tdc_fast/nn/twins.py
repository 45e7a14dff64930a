"""From a dense layer to the routed leaf that holds several experts of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tdc_fast.errors import invalid
from tdc_fast.nn import layers
from tdc_fast.nn.leaf import LiveAxis, RoutedLeaf, has_hooks
from tdc_fast.nn.routed import (
    RoutedConv1d,
    RoutedConv2d,
    RoutedEmbedding,
    RoutedGroupNorm,
    RoutedLinear,
)
from tdc_fast.nn.routed_attention import RoutedMultiheadAttention
from tdc_fast.nn.routed_layer_norm import RoutedLayerNorm


def routed_twin(
    name: str, layer: nn.Module, num_experts: int, out: LiveAxis | None, in_: LiveAxis | None
) -> RoutedLeaf | None:
    """The routed leaf for `num_experts` experts of a dense layer, uninitialised; None where no kernel serves it.

    Args:
        name: the layer's path, for errors.
        layer: the dense layer.
        num_experts: number of experts.
        out: live output channels of pruned experts; None where no expert is pruned.
        in_: the same for input channels.

    Raises:
        ValueError: for channels that are pruned in a layer that no kernel serves, or that has none to prune.
    """
    with torch.device("meta"):
        leaf = _twin(layer, num_experts, out, in_)
    if leaf is None or isinstance(leaf, _NEVER_PRUNED):
        if out is not None or in_ is not None:
            remedy = "a layer whose channels can be pruned, without hooks; or leave out its unit"
            raise invalid(f"module {name!r}", repr(layer), remedy)
        if leaf is None:
            return None
    leaf.template = (copy.deepcopy(layer).to("meta"),)
    original = next(layer.parameters())
    leaf.to(original.dtype).to_empty(device=original.device)
    leaf.set_live(out, in_)
    leaf.train(layer.training)
    for key, parameter in leaf.named_parameters():
        parameter.requires_grad_(layer.get_parameter(key).requires_grad)
    return leaf


_NEVER_PRUNED = (RoutedEmbedding, RoutedLayerNorm, RoutedMultiheadAttention)


def _twin(layer: nn.Module, experts: int, out: LiveAxis | None, in_: LiveAxis | None) -> RoutedLeaf | None:
    """By the exact class: a subclass may compute something else."""

    def sized(axis: LiveAxis | None, channels: int) -> int:
        return channels if axis is None else axis.size

    if has_hooks(layer):
        return None  # they are called with the dense layer
    kind = type(layer)
    if kind in (nn.Conv2d, layers.Conv2d):
        assert isinstance(layer, nn.Conv2d)
        padding = _padding(layer)
        if padding is None or not _has(layer, groups=1, dilation=(1, 1), padding_mode="zeros"):
            return None
        assert out is None or out.copies == 1, "no unit has several blocks of a convolution's channels"
        channels = sized(in_, layer.in_channels), sized(out, layer.out_channels)
        return RoutedConv2d(experts, *channels, layer.kernel_size, layer.stride, padding, layer.bias is not None)  # type: ignore[arg-type]
    if kind in (nn.Conv1d, layers.TokenConv1d):
        assert isinstance(layer, nn.Conv1d)
        if not _has(layer, kernel_size=(1,), stride=(1,), groups=1) or layer.padding not in ((0,), "same", "valid"):
            return None
        routed = RoutedLinear if kind is layers.TokenConv1d else RoutedConv1d
        channels = sized(in_, layer.in_channels), sized(out, layer.out_channels)
        leaf = routed(experts, *channels, layer.bias is not None)
        leaf.filter_axis = True
        return leaf
    if kind in (nn.Linear, layers.Linear):
        assert isinstance(layer, nn.Linear)
        channels = sized(in_, layer.in_features), sized(out, layer.out_features)
        return RoutedLinear(experts, *channels, layer.bias is not None)
    if kind in (nn.GroupNorm, layers.GroupNorm):
        assert isinstance(layer, nn.GroupNorm)
        size = sized(out, layer.num_channels)
        per_group = layer.num_channels // layer.num_groups
        return RoutedGroupNorm(experts, max(size // per_group, 1), size, layer.eps)
    if kind is nn.LayerNorm:
        assert isinstance(layer, nn.LayerNorm)
        return RoutedLayerNorm(experts, layer.normalized_shape, layer.eps, layer.bias is not None)
    if kind is nn.Embedding and _has(layer, padding_idx=None, max_norm=None, scale_grad_by_freq=False):
        assert isinstance(layer, nn.Embedding)
        return RoutedEmbedding(experts, layer.num_embeddings, layer.embedding_dim)
    if kind is nn.MultiheadAttention and _has(layer, bias_k=None, bias_v=None, add_zero_attn=False):
        assert isinstance(layer, nn.MultiheadAttention)
        return RoutedMultiheadAttention(experts, layer)
    return None


def _padding(layer: nn.Conv2d) -> tuple[int, ...] | None:
    """The padding in numbers; None where it is not the same on both sides."""
    if not isinstance(layer.padding, str):
        return layer.padding
    if layer.padding == "valid":
        return (0, 0)
    return tuple(size // 2 for size in layer.kernel_size) if all(size % 2 for size in layer.kernel_size) else None


def _has(layer: nn.Module, **settings: object) -> bool:
    return all(getattr(layer, setting) == value for setting, value in settings.items())
