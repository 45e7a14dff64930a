"""Times of layers and of whole routed models on a device, and how well a model of them predicts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.nn.attention import qkv_attention
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.units import Prunable, module_of
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.ops import routed_conv2d, routed_group_norm
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.latency.layers import Layer
from tdc_fast.pruning.latency.setting import Setting
from tdc_fast.routing import RoutingPlan, TimestepGroups

_MIN_ROUNDS = 5
_CALLS = 8  # of a layer in one CUDA graph, so that starting the graph hardly counts


def layer_nanoseconds(layer: Layer, setting: Setting, device: torch.device, seconds: float) -> int:
    """The median time of one forward of a layer over a batch, every group with the same live channels.

    On a GPU it is the time within a CUDA graph, as in training.

    Args:
        layer: the layer.
        setting: dtype, batch and groups.
        device: where to run it.
        seconds: about how long to measure.
    """
    with torch.no_grad():
        return _median_time(_call(layer, setting, device), device, seconds)


def model_nanoseconds(
    base: nn.Module | Prunable,
    x: Tensor,
    model_kwargs: Mapping[str, Any],
    setting: Setting,
    shares: Sequence[float],
    seconds: float,
) -> dict[float, tuple[int, WidthPlan]]:
    """Times of whole routed models whose first expert is the whole base and whose others keep a share of every unit.

    Args:
        base: the denoiser.
        x: a batch of images (B, ...) on its device.
        model_kwargs: keyword arguments of the denoiser.
        setting: batch and groups; x has that batch.
        shares: of the units' widths, from 0 to 1.
        seconds: about how long to measure each.

    Returns:
        {share: (nanoseconds of a forward, the plan)}.
    """
    groups = TimestepGroups.uniform(setting.num_groups, setting.num_groups)
    t = torch.arange(setting.batch, device=x.device) % setting.num_groups
    found = {}
    for share in shares:
        plan = WidthPlan.uniform(base, groups.boundaries, [1.0, *[share] * (setting.num_groups - 1)])
        model = pack_experts(module_of(base), groups, plan)
        with torch.no_grad():

            def run(model: Any = model) -> Any:
                return model(x, t, **model_kwargs)

            found[share] = _median_time(run, x.device, seconds), plan
    return found


def mean_over_experts(costs: UnitCosts, plan: WidthPlan) -> float:
    """The predicted time of a batch with equally many samples of every expert."""
    return statistics.fmean(costs.total(plan.expert_widths(index)) for index in range(len(plan.experts)))


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's: 1 where both have the same order; NaN where one of them does not vary. Equal values share a rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, place, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
        last = np.cumsum(count)
        mean: np.ndarray = (last - (count - 1) / 2)[place]
        return mean

    first, second = (ranks(values) - (len(values) + 1) / 2 for values in (predicted, measured))
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm else float("nan")


def median_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Median of |c * predicted - measured| / measured, with the factor c that makes the median ratio 1.

    Budgets are shares of the base's own time, so a constant factor does not matter.
    """
    ratio = np.asarray(predicted, dtype=np.float64) / np.asarray(measured, dtype=np.float64)
    return float(np.median(np.abs(ratio / np.median(ratio) - 1)))


def _median_time(call: Callable[[], Any], device: torch.device, seconds: float) -> int:
    if device.type == "cuda":
        return _in_graph(call, seconds)
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < _MIN_ROUNDS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(round(1e9 * statistics.median(times)), 1)


def _in_graph(call: Callable[[], Any], seconds: float) -> int:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for _ in range(_CALLS)]
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_ROUNDS or time.perf_counter() < end:
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        finish.record()
        finish.synchronize()
        times.append(begin.elapsed_time(finish) / _CALLS)
    del kept
    return max(round(1e6 * statistics.median(times)), 1)


def _call(layer: Layer, setting: Setting, device: torch.device) -> Callable[[], Any]:
    """The routed operator on random data of the layer's shape; channels of x past the live ones are zero."""
    generator = torch.Generator().manual_seed(0)
    dtype, batch, count = setting.torch_dtype, setting.batch, setting.num_groups

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    if layer.kind == "attention":
        qkv, heads = random(batch, layer.height, layer.in_channels), layer.num_groups
        live = torch.arange(heads, device=device) < layer.live_out * heads // layer.out_channels
        return lambda: qkv_attention(qkv, layer.out_channels // heads, live.expand(batch, heads))
    groups = (torch.arange(batch) * count // batch).to(device)
    plan = RoutingPlan.from_groups(groups, count)
    x = random(batch, layer.height, layer.width, layer.in_channels)
    x[..., layer.live_in :] = 0
    x = x.permute(0, 3, 1, 2)

    def widths(live: int, full: int) -> Tensor | None:
        return None if live == full else torch.full((count,), live, dtype=torch.int32, device=device)

    in_widths, out_widths = widths(layer.live_in, layer.in_channels), widths(layer.live_out, layer.out_channels)
    if layer.kind == "group_norm":
        weight, bias = random(count, layer.in_channels), random(count, layer.in_channels)
        return lambda: routed_group_norm(
            x, weight, bias, plan, num_groups=layer.num_groups, widths=in_widths, activation="silu"
        )
    weight = random(count, layer.out_channels, *layer.filter, layer.in_channels).permute(0, 1, 4, 2, 3)
    bias = random(count, layer.out_channels)
    return lambda: routed_conv2d(
        x,
        weight,
        bias,
        plan,
        stride=layer.stride,
        padding=layer.padding,
        upsample=layer.upsample,
        in_widths=in_widths,
        out_widths=out_widths,
    )
