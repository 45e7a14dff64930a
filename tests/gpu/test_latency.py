"""Budgets in time on a GPU: layers are timed in CUDA graphs, and a table serves the run that it was measured for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdc_fast.latency import main
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.latency import LatencyTable, Layer, Roofline, Setting
from tdc_fast.pruning.latency.timing import layer_nanoseconds
from tdc_fast.train import main as train_command
from tests.training.small_run import TWO_STAGES, flags, small_config

pytestmark = pytest.mark.gpu

CONV = Layer("conv2d", 256, 256, 32, 32, 256, 256, (3, 3), (1, 1), (1, 1))
LAYERS = {
    "conv2d": CONV,
    "linear": Layer("linear", 256, 512, 64, 1, 256, 512),
    "group_norm": Layer("group_norm", 256, 256, 16, 16, 256, 256, num_groups=32),
    "attention": Layer("attention", 3 * 256, 256, 64, 1, 3 * 256, 256, num_groups=4),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_every_kind_is_timed_whole_and_narrow(kind: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    setting, layer = Setting.on(device, dtype, 64, 8), LAYERS[kind]
    assert setting.device == torch.cuda.get_device_name()
    narrow = layer.narrowed("out", layer.out_channels // 2)
    if kind == "attention":
        narrow = narrow.narrowed("in", layer.in_channels // 2)
    for measured in (layer, narrow, layer.narrowed("in", 0)):
        assert layer_nanoseconds(measured, setting, device, 0.0) > 0


def test_more_work_takes_longer_by_the_clock_and_by_the_roofline() -> None:
    """A hundred times the pixels: far more than any noise."""
    device = torch.device("cuda")
    small = Layer("conv2d", 256, 256, 8, 8, 256, 256, (3, 3), (1, 1), (1, 1))
    large = Layer("conv2d", 256, 256, 80, 80, 256, 256, (3, 3), (1, 1), (1, 1))
    setting, model = Setting.on(device, torch.bfloat16, 64, 8), Roofline.on(device, torch.bfloat16, 64, 8)
    measured = [layer_nanoseconds(layer, setting, device, 0.05) for layer in (small, large)]
    assert measured[1] > 10 * measured[0] and model.nanoseconds(large) > 10 * model.nanoseconds(small)
    assert model.step(CONV.narrowed("out", 255)) in (64, 128) and model.step(CONV.narrowed("in", 255)) in (16, 32, 64)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_table_measured_on_the_gpu_is_what_its_run_is_pruned_with(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = small_config(
        tmp_path, "run", **{**TWO_STAGES, "num_channels": 32, "k": 0.9}, stop_after="pruning", precision=precision,
        device="cuda",
    )  # fmt: skip
    table = tmp_path / "times.json"
    assert main([*flags(config), "--out", str(table), "--seconds", "0.001"]) == 0
    assert "the table predicts whole models" in capsys.readouterr().out
    measured = LatencyTable.load(table)
    assert measured.setting.device == torch.cuda.get_device_name()
    assert measured.backends.keys() == {"conv2d", "linear", "group_norm"}
    in_time = ["--budget_in", "latency", "--latency_table", str(table), "--width_step", "auto"]
    status, said = train_command([*flags(config), *in_time]), capsys.readouterr().err
    if status == 2:  # launches of so small a network take most of its time, and no width saves them
        assert "the smallest reachable budget is" in said and " ns," in said
        return
    plan = WidthPlan.load(tmp_path / "run" / "widths.json")
    assert all(ns <= allowed for ns, allowed in zip(plan.latency, plan.latency_budgets, strict=True))
