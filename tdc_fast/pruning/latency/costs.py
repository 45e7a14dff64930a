"""The estimated time of a model: a constant plus one function of each unit's width, as `UnitCosts` in nanoseconds.

In a routed model every layer runs at the base's full shape, and each group has its own live channels. So the time of a
unit at a width is that of its layers at their full shape with fewer live channels. What has no parameters (additions,
resampling) is left out, and at width 0 a unit still costs what its layers cost with nothing live.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.units import Prunable, PruningUnit, units_of, with_widths
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.latency.layers import MAX_NANOSECONDS, LatencyModel, Layer, layers_of


def unit_latencies(
    base: nn.Module | Prunable, x: Tensor, model_kwargs: Mapping[str, Any] | None, model: LatencyModel
) -> UnitCosts:
    """Estimate the time of every unit at each of its widths.

    Args:
        base: the denoiser. It is not changed.
        x: images (B, ...), of which only the shape of one and the dtype matter.
        model_kwargs: keyword arguments of the denoiser.
        model: estimates the time of layers.

    Raises:
        ValueError: two units share a layer, or the model knows nothing about one of the layers, or gives no number of
            nanoseconds for it.
    """
    layers, units = _layers(base, x, model_kwargs), units_of(base)
    tables: dict[str, dict[int, int]] = {unit.name: {} for unit in units}
    owners: dict[str, str] = {}
    for unit in units:
        for part in unit.slices:
            if owners.setdefault(part.module, unit.name) != unit.name:
                remedy = "units that have no layer in common: its time is no sum over units otherwise"
                raise invalid("base", f"layer {part.module} of {owners[part.module]} and {unit.name}", remedy)
        for width in unit.widths():
            at_width = layers_at(unit, width, layers)
            tables[unit.name][width] = sum(_nanoseconds(model, layer) for layer in at_width)
    rest = [layer for path, calls in layers.items() if path not in owners for layer in calls]
    costs = UnitCosts(sum(_nanoseconds(model, layer) for layer in rest), tables, "ns")
    if not costs.full():
        raise invalid("latency", "0 ns for every layer", "times of which budgets can be shares")
    return costs


def _nanoseconds(model: LatencyModel, layer: Layer) -> int:
    """What a model estimates for a layer, which the exact solver adds up."""
    found = model.nanoseconds(layer)
    if isinstance(found, bool) or not isinstance(found, (int, np.integer)) or not 0 <= found <= MAX_NANOSECONDS:
        raise invalid("latency", found, f"for {layer} a whole number of nanoseconds from 0 to {MAX_NANOSECONDS}")
    return int(found)


def layers_at(unit: PruningUnit, width: int, layers: Mapping[str, Sequence[Layer]]) -> list[Layer]:
    """The layers of a unit with the live channels of a width, and of an attention unit its attention.

    Args:
        unit: the unit.
        width: in channels.
        layers: those of the whole model, as `layers_of` gives them.
    """
    live: dict[str, list[Layer]] = {}
    for part in unit.slices:
        found = live.get(part.module, layers.get(part.module, ()))
        live[part.module] = [layer.narrowed(part.dim, width * part.copies * part.scale) for layer in found]
        if unit.kind == "attention" and part.scale == 3 and found:  # queries, keys and values of one layer
            attention = Layer(
                "attention", 3 * unit.channels, unit.channels, found[0].height, 1, 3 * width, width,
                num_groups=unit.num_atoms,
            )  # fmt: skip
            live[unit.name] = [attention]
    return [layer for calls in live.values() for layer in calls]


def all_layers(base: nn.Module | Prunable, x: Tensor, model_kwargs: Mapping[str, Any] | None) -> list[Layer]:
    """Every distinct layer that `unit_latencies` asks a model about."""
    layers, units = _layers(base, x, model_kwargs), units_of(base)
    owned = [layer for unit in units for width in unit.widths() for layer in layers_at(unit, width, layers)]
    return list(dict.fromkeys([layer for calls in layers.values() for layer in calls] + owned))


def stepped(
    base: nn.Module | Prunable,
    units: Sequence[PruningUnit],
    x: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    width_step: int | Callable[[Layer], int],
) -> tuple[PruningUnit, ...]:
    """The units with coarser steps: multiples of `width_step` wherever it divides a convolution's channels.

    Args:
        base: the denoiser.
        units: its units.
        x: images (B, ...), as in `unit_latencies`.
        model_kwargs: keyword arguments of the denoiser.
        width_step: channels, or what gives them for each convolution of a unit, narrowed to one channel less than all.
            The least of a unit's convolutions counts, since from there on at least one of them takes less time.
    """
    layers = _layers(base, x, model_kwargs)

    def wanted(unit: PruningUnit) -> int:
        narrowed = [layer for layer in layers_at(unit, unit.channels - 1, layers) if layer.kind == "conv2d"]
        if not narrowed:
            return unit.step
        steps = [width_step(layer) if callable(width_step) else width_step for layer in narrowed]
        return math.lcm(unit.step, math.gcd(unit.channels, min(steps)))

    return tuple(dataclasses.replace(unit, step=wanted(unit)) for unit in units)


def _layers(base: nn.Module | Prunable, x: Tensor, model_kwargs: Mapping[str, Any] | None) -> dict[str, list[Layer]]:
    return layers_of(with_widths(base, {}).to("meta"), x, model_kwargs)
