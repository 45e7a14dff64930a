"""Linear layers that all read one input, such as the timestep embedding, in one launch on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdc_fast.nn.layers import Linear
from tdc_fast.nn.leaf import has_hooks
from tdc_fast.nn.routed import RoutedLinear
from tdc_fast.ops import routed_linear
from tdc_fast.routing import RoutingPlan


def launches_cost(device: torch.device) -> bool:
    """Whether a launch on this device costs more than copying the weights, as it does on a GPU."""
    return device.type == "cuda"


def chunks_in_one_launch(
    layers: Sequence[Linear | RoutedLinear], x: Tensor, count: int
) -> list[tuple[Tensor, ...]] | None:
    """`layer.chunks(x, count)` for every layer.

    Args:
        layers: dense or routed, all of them.
        x: (B, C_in).
        count: chunks per layer.

    Returns:
        For each layer its chunks, (B, C_out / count) each; None where the layers should run one after the other: on
        the CPU, where stacking their weights would take longer than it saves, for layers that are not routed or have
        hooks, and where groups share some of the layers only.
    """
    if not launches_cost(x.device):
        return None
    routed = [layer for layer in layers if isinstance(layer, RoutedLinear)]
    plain = any(layer.bias is None or layer.in_widths is not None or layer.closing_gate is not None for layer in routed)
    if not routed or plain or any(map(has_hooks, routed)) or len({layer.rows for layer in routed}) > 1:
        return None
    pruned = next((layer for layer in routed if layer.out_widths is not None), routed[0])  # needs all groups apart
    return _in_one_launch(routed, x, count, pruned.current_plan(None))


def _in_one_launch(
    layers: Sequence[RoutedLinear], x: Tensor, count: int, plan: RoutingPlan
) -> list[tuple[Tensor, ...]]:
    """Every chunk of every layer gets a copy of the batch, and groups and experts of its own."""
    sizes = [layer.out_features // count for layer in layers]
    most, chunks = max(sizes), len(layers) * count
    weights: list[Tensor] = []  # (count, E, most, C_in) for each layer
    biases: list[Tensor] = []  # (count, E, most)
    for layer in layers:
        weight, bias, _ = layer.operands(x.dtype)
        assert bias is not None
        weights.append(_padded(layer.apart(weight, count), most))
        biases.append(_padded(layer.apart(bias, count), most))
    y = routed_linear(
        x.repeat(chunks, 1),
        torch.cat(weights).flatten(0, 1),
        torch.cat(biases).flatten(0, 1),
        plan.repeated(chunks, layers[0].num_experts),
        out_widths=_widths(layers, sizes, count, plan.num_groups),
    )
    each = y.view(chunks, len(x), most).unbind(0)
    return [
        tuple(chunk if size == most else chunk[:, :size] for chunk in each[index * count : (index + 1) * count])
        for index, size in enumerate(sizes)
    ]


def _padded(value: Tensor, most: int) -> Tensor:
    """(count, E, size, ...) as (count, E, most, ...), zeros in the end."""
    missing = most - value.shape[2]
    return F.pad(value, (*[0] * (2 * (value.dim() - 3)), 0, missing)) if missing else value


def _widths(layers: Sequence[RoutedLinear], sizes: Sequence[int], count: int, num_groups: int) -> Tensor | None:
    """Live channels for every group of every chunk, int32; None where all have all."""
    if len(set(sizes)) == 1 and all(layer.out_widths is None for layer in layers):
        return None
    device = layers[0].weight.device
    whole = {size: torch.full((num_groups,), size * count, dtype=torch.int32, device=device) for size in set(sizes)}
    live = [whole[n] if layer.out_widths is None else layer.out_widths for layer, n in zip(layers, sizes, strict=True)]
    return (torch.stack(live) // count).repeat_interleave(count, dim=0, output_size=len(layers) * count).flatten()
