"""The model of time that a run's options name, for budgets in time and for widths that the device's kernels step in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tdc_fast.nn.macs import measure_macs
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.latency import LatencyModel, LatencyTable, Layer, Roofline, Setting, unit_latencies
from tdc_fast.pruning.latency.costs import stepped
from tdc_fast.runs.build import build_device, outline_unet
from tdc_fast.runs.config import TrainConfig


def stage2_setting(config: TrainConfig, num_groups: int) -> Setting:
    """Where and how the experts are trained: device, dtype, samples of a forward and groups.

    Args:
        config: the options of the run.
        num_groups: N.
    """
    return Setting.on(build_device(config), _dtype(config), _batch(config), num_groups, config.num_threads)


def latency_model(config: TrainConfig, num_groups: int) -> LatencyModel | None:
    """What estimates the time of the experts' layers: the table that is named, else a roofline; None if nothing asks.

    Args:
        config: the options of the run.
        num_groups: N.

    Raises:
        ValueError: the table is damaged, or of another device, dtype, batch or number of groups, or of other backends.
    """
    if config.latency_table:
        table = LatencyTable.load(config.latency_table)
        table.check(stage2_setting(config, num_groups), build_device(config))
        return table
    return roofline(config, num_groups) if config.budget_in == "latency" else None


def check_table(config: TrainConfig) -> None:
    """Refuse a table that does not fit the run, as far as that is known while its number of groups is not.

    Args:
        config: the options of the run.

    Raises:
        ValueError: the table is damaged, or of another device, dtype, batch or other backends.
    """
    if config.latency_table:
        table = LatencyTable.load(config.latency_table)
        table.check(stage2_setting(config, table.setting.num_groups), build_device(config))


def roofline(config: TrainConfig, num_groups: int) -> Roofline:
    """The roofline of the device that experts are trained on."""
    return Roofline.on(build_device(config), _dtype(config), _batch(config), num_groups, config.num_threads)


def outline_costs(config: TrainConfig, in_channels: int) -> tuple[int, int, str]:
    """The least and the full cost of the network in what budgets count, without its weights.

    Args:
        config: the options of the run, with a number of groups.
        in_channels: channels of its images.

    Returns:
        (least, full, measure), the last as in `UnitCosts`.
    """
    base = outline_unet(config, in_channels)
    x = torch.zeros(1, in_channels, config.image_size, config.image_size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    labels = {"y": t} if config.class_cond else {}
    model = latency_model(config, config.groups)
    if config.budget_in == "latency" and model is not None:
        costs: UnitCosts = unit_latencies(base, x, labels, model)
        if config.width_step != "1":
            units = stepped(base, base.pruning_units(), x, labels, width_step(config, config.groups))
            costs = costs.at_widths_of(units)
        return costs.least(), costs.full(), costs.measure
    smallest = base.with_widths({unit.name: min(unit.widths()) for unit in base.pruning_units()})
    least, full = (measure_macs(network.to("meta"), x, t, **labels) for network in (smallest, base))
    return least, full, "MACs"


def width_step(config: TrainConfig, num_groups: int) -> int | Callable[[Layer], int]:
    """The channels in which widths step, as `PruningSettings` takes them.

    Args:
        config: the options of the run.
        num_groups: N.
    """
    return roofline(config, num_groups).step if config.width_step == "auto" else int(config.width_step)


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.mixed_precision else torch.float32


def _batch(config: TrainConfig) -> int:
    """Samples of one forward in stage 2."""
    batch = config.stage2_batch or config.batch_size
    return min(batch, config.microbatch) if config.microbatch > 0 else batch
