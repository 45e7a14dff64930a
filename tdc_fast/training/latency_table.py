"""Measuring a table of the times of a network's layers (the command `tdc_fast.latency`)."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch

import tdc_fast
from tdc_fast.progress import Progress
from tdc_fast.pruning.latency import LatencyTable, Layer, unit_latencies
from tdc_fast.pruning.latency.costs import all_layers
from tdc_fast.pruning.latency.problems import backends_of
from tdc_fast.pruning.latency.setting import instruction_set
from tdc_fast.pruning.latency.timing import (
    layer_nanoseconds,
    mean_over_experts,
    median_error,
    model_nanoseconds,
    rank_correlation,
)
from tdc_fast.runs.build import build_data, build_device, build_unet, place, refuse_what_cannot_fit
from tdc_fast.runs.config import TrainConfig
from tdc_fast.training.latency import roofline, stage2_setting

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Widths of the whole models that the table is checked on."""


def measure_table(
    config: TrainConfig, seconds: float = 0.05, in_channels: int | None = None
) -> tuple[LatencyTable, str]:
    """Measure the layers of a run's network at every width, on the device and in the setting of its stage 2.

    Args:
        config: the options of the run, with a number of groups.
        seconds: about how long to measure each layer.
        in_channels: channels of its images; None takes --in_channels, or what the data has, or 3.

    Returns:
        The table, and lines about how well models predict: the roofline the layers, and the table whole models.
    """
    has_data = config.data_dir or config.latents
    channels = in_channels or config.in_channels or (build_data(config).channels if has_data else 3)
    device, setting = build_device(config), stage2_setting(config, config.groups)
    refuse_what_cannot_fit(config, channels, device, config.groups)
    torch.manual_seed(0)
    base = place(build_unet(config, channels), device).eval().requires_grad_(False)
    x = torch.randn(setting.batch, channels, config.image_size, config.image_size).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = {"y": torch.zeros(setting.batch, dtype=torch.int64, device=device)} if config.class_cond else {}
    layers = all_layers(base, x, labels)
    rows: dict[Layer, int] = {}
    with Progress("measuring layers", len(layers), shown=config.progress != "never", unit="layer") as progress:
        for layer in layers:
            rows[layer] = layer_nanoseconds(layer, setting, device, seconds)
            progress.update()
    table = LatencyTable(
        setting, rows, _facts(), backends=backends_of(layers, setting, device), instruction_set=instruction_set(device)
    )
    estimated = [roofline(config, config.groups).nanoseconds(layer) for layer in layers]
    lines = [
        f"{len(rows)} times on {setting.device}, {setting.dtype}, batch {setting.batch}, {setting.num_groups} groups",
        "backends: " + ", ".join(f"{kind} {' and '.join(names)}" for kind, names in table.backends.items()),
        f"MACs and bytes predict these layers with {_quality(estimated, list(rows.values()))}",
    ]
    if setting.num_groups > 1:
        costs = unit_latencies(base, x, labels, table)
        cast = base.to(setting.torch_dtype)
        timed = model_nanoseconds(cast, x.to(setting.torch_dtype), labels, setting, SHARES, 20 * seconds)
        predicted = [mean_over_experts(costs, plan) for _, plan in timed.values()]
        lines.append(
            f"the table predicts whole models at {', '.join(f'{share:.0%}' for share in SHARES)} of the widths with "
            + _quality(predicted, [ns for ns, _ in timed.values()])
        )
    return table, "\n".join(lines)


def _quality(predicted: Sequence[float], measured: Sequence[float]) -> str:
    rank, error = rank_correlation(predicted, measured), median_error(predicted, measured)
    return f"rank correlation {rank:.3f}, median error {error:.1%} up to a constant factor"


def _facts() -> dict[str, str]:
    return {"date": datetime.date.today().isoformat(), "tdc_fast": tdc_fast.__version__, "torch": torch.__version__}
