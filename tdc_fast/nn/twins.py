"""From a dense layer to the routed leaf that holds several experts of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tdc_fast.errors import invalid
from tdc_fast.nn.leaf import LiveAxis, RoutedLeaf
from tdc_fast.nn.routed import (
    RoutedConv1d,
    RoutedConv2d,
    RoutedEmbedding,
    RoutedGroupNorm,
    RoutedLinear,
)


def routed_twin(
    name: str, layer: nn.Module, num_experts: int, out: LiveAxis | None, in_: LiveAxis | None
) -> RoutedLeaf:
    """The routed leaf for `num_experts` experts of a dense layer, uninitialised.

    Args:
        name: the layer's path, for errors.
        layer: the dense layer.
        num_experts: number of experts.
        out: live output channels of pruned experts; None where no expert is pruned.
        in_: the same for input channels.

    Raises:
        ValueError: for a layer without a routed twin, or with a setting that routed operators do not have.
    """
    with torch.device("meta"):
        leaf = _twin(name, layer, num_experts, out, in_)
    leaf.template = (copy.deepcopy(layer).to("meta"),)
    original = next(layer.parameters())
    leaf.to(original.dtype).to_empty(device=original.device)
    leaf.set_live(out, in_)
    leaf.train(layer.training)
    for key, parameter in leaf.named_parameters():
        parameter.requires_grad_(layer.get_parameter(key).requires_grad)
    return leaf


def _twin(name: str, layer: nn.Module, experts: int, out: LiveAxis | None, in_: LiveAxis | None) -> RoutedLeaf:
    def sized(axis: LiveAxis | None, channels: int) -> int:
        return channels if axis is None else axis.size

    if isinstance(layer, nn.Conv2d):
        _require(name, layer, groups=1, dilation=(1, 1), padding_mode="zeros")
        if isinstance(layer.padding, str):
            raise invalid(f"{name}.padding", layer.padding, "numbers")
        channels = sized(in_, layer.in_channels), sized(out, layer.out_channels)
        return RoutedConv2d(experts, *channels, layer.kernel_size, layer.stride, layer.padding, layer.bias is not None)  # type: ignore[arg-type]
    if isinstance(layer, nn.Conv1d):
        _require(name, layer, kernel_size=(1,), stride=(1,), padding=(0,), groups=1)
        kind = RoutedLinear if type(layer) is not nn.Conv1d else RoutedConv1d
        channels = sized(in_, layer.in_channels), sized(out, layer.out_channels)
        leaf = kind(experts, *channels, layer.bias is not None)
        leaf.filter_axis = True
        return leaf
    if isinstance(layer, nn.Linear):
        channels = sized(in_, layer.in_features), sized(out, layer.out_features)
        return RoutedLinear(experts, *channels, layer.bias is not None)
    if isinstance(layer, nn.GroupNorm):
        size = sized(out, layer.num_channels)
        per_group = layer.num_channels // layer.num_groups
        return RoutedGroupNorm(experts, max(size // per_group, 1), size, layer.eps)
    if isinstance(layer, nn.Embedding):
        _require(name, layer, padding_idx=None, max_norm=None, scale_grad_by_freq=False, sparse=False)
        return RoutedEmbedding(experts, layer.num_embeddings, layer.embedding_dim)
    raise invalid(name, type(layer).__name__, "a layer that has a routed twin")


def _require(name: str, layer: nn.Module, **settings: object) -> None:
    for setting, value in settings.items():
        if getattr(layer, setting) != value:
            raise invalid(f"{name}.{setting}", getattr(layer, setting), f"{value}, all that routed layers have")
