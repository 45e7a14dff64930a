"""Layers as operator problems, for which a backend can be chosen, and the backends that would run them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from tdc_fast.kernels.problems import ConvProblem, NormProblem, Problem
from tdc_fast.ops.backends import explain_problem
from tdc_fast.ops.checks import tf32_is_allowed
from tdc_fast.pruning.latency.layers import Layer
from tdc_fast.pruning.latency.setting import Setting


def conv_problem(layer: Layer, setting: Setting, device: torch.device) -> ConvProblem:
    """The convolution, which linear layers are too, at its full shape.

    Args:
        layer: a layer with weights.
        setting: dtype, batch and groups.
        device: where it runs.
    """
    dtype = setting.torch_dtype
    return ConvProblem(
        "routed_conv2d", device, dtype, setting.batch, layer.height, layer.width, layer.in_channels,
        layer.out_channels, layer.filter, layer.stride, layer.padding, *layer.out_size, setting.num_groups,
        setting.num_groups, dtype == torch.float32 and tf32_is_allowed(), upsample=layer.upsample,
    )  # fmt: skip


def backends_of(layers: Iterable[Layer], setting: Setting, device: torch.device) -> dict[str, tuple[str, ...]]:
    """The backends that would run layers here and now: {kind: their names}, without attention, which is torch's.

    They follow from the device and its packages, from measured times, and from TDC_FAST_BACKEND.

    Args:
        layers: of any kinds; how many of their channels are live does not matter.
        setting: dtype, batch and groups.
        device: where they run.
    """
    found: dict[str, set[str]] = {}
    for layer in dict.fromkeys(layer.full for layer in layers if layer.kind != "attention"):
        make: Callable[..., Problem] = _norm_problem if layer.kind == "group_norm" else conv_problem
        problem = make(layer, setting, device)
        found.setdefault(layer.kind, set()).add(explain_problem(problem.op, problem).backend or "none that can")
    return {kind: tuple(sorted(names)) for kind, names in sorted(found.items())}


def _norm_problem(layer: Layer, setting: Setting, device: torch.device) -> NormProblem:
    return NormProblem(
        "routed_group_norm", device, setting.torch_dtype, setting.batch, layer.height, layer.width, layer.in_channels,
        layer.num_groups, 1e-5, True, setting.num_groups, setting.num_groups,
    )  # fmt: skip
