"""The command that measures the times of a model's layers, and runs with budgets in that time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdc_fast import latency
from tdc_fast.latency import main
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.latency import LatencyTable
from tdc_fast.pruning.latency.problems import backends_of
from tdc_fast.pruning.latency.setting import instruction_set
from tdc_fast.routing import TimestepGroups
from tdc_fast.train import TrainConfig, train
from tdc_fast.train import main as train_command
from tests.training.small_run import TWO_STAGES, flags, small_config

SMALLER = {"channel_mult": "1", "attention_resolutions": "8", "groups": 2}
"""Two units instead of five."""


def test_a_measured_table_is_what_a_run_of_the_same_flags_is_pruned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = small_config(tmp_path, "run", **{**TWO_STAGES, **SMALLER, "k": 0.98}, stop_after="pruning")
    table = tmp_path / "times.json"
    assert main([*flags(config), "--out", str(table), "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert "MACs and bytes predict these layers with rank correlation" in said
    assert "the table predicts whole models at 0%, 25%, 50%, 75%, 100% of the widths with rank" in said
    measured = LatencyTable.load(table)
    assert measured.setting.batch == 6 and measured.setting.num_groups == 2
    assert measured.backends == backends_of(measured.rows, measured.setting, torch.device("cpu"))
    assert measured.instruction_set == instruction_set(torch.device("cpu"))
    assert measured.backends.keys() == {"conv2d", "linear", "group_norm"}
    assert f"backends: conv2d {measured.backends['conv2d'][0]}, " in said
    assert f"{len(measured.rows)} times on {measured.setting.device}, float32, batch 6, 2 groups" in said
    in_time = ["--budget_in", "latency", "--latency_table", str(table)]
    assert train_command([*flags(config), *in_time]) == 0
    assert f"k = 0.98 of the base's time (measured in {table})" in capsys.readouterr().out
    plan = WidthPlan.load(tmp_path / "run" / "widths.json")
    assert plan.latency[1] <= plan.latency_budgets[1] < plan.latency_budgets[0] == plan.latency[0]


def test_budgets_that_no_widths_meet_and_tables_that_do_not_fit_are_refused_before_stage_1(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = small_config(tmp_path, "run", **{**TWO_STAGES, **SMALLER, "k": 0.02}, budget_in="latency")
    assert train_command(flags(config)) == 2
    said = capsys.readouterr().err
    assert "k: got 0.02; expected a larger one: the easiest group is allowed" in said and " ns," in said
    missing = config.replace(k=0.9, latency_table=str(tmp_path / "missing.json"))
    assert train_command(flags(missing)) == 2
    assert "missing.json is not a valid latency table" in capsys.readouterr().err
    for changes in ({"groups": -1, "grouping": "similarity"}, {"k": 1.0}):
        assert train_command(flags(missing.replace(**changes))) == 2
        assert "missing.json is not a valid latency table" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_measured_how_many_groups_it_has_tells_the_number_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure_table", lambda config, *_: pytest.fail(f"{config.groups} groups"))
    open_groups = {**TWO_STAGES, **SMALLER, "groups": -1, "grouping": "similarity"}
    run = train(small_config(tmp_path, "run", **open_groups, stop_after="stage1"))
    groups = tmp_path / "run" / "groups.json"
    command = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "times.json")]
    assert main(command) == 2 and "groups: got -1; expected --groups N" in capsys.readouterr().err
    TimestepGroups.uniform(run.config.diffusion_steps, 4).save(groups)
    with pytest.raises(pytest.fail.Exception, match="4 groups"):
        main(command)
    with pytest.raises(pytest.fail.Exception, match="2 groups"):
        main([*command, "--groups", "2"])


@pytest.mark.parametrize("step", ["0", "-8", "8.5", "wide", "9000", "0000000819299", ""])
def test_a_width_step_is_a_number_of_channels_or_auto(step: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width_step: got .*expected a number of channels from 1 to 8192, or auto"):
        small_config(tmp_path, **TWO_STAGES, width_step=step)
    small_config(tmp_path, **TWO_STAGES, width_step="auto")


@pytest.mark.parametrize(
    ("option", "value"), [("budget_in", "latency"), ("latency_table", "t"), ("width_step", "auto")]
)
def test_options_of_time_need_experts(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: got '{value}'; expected --groups N as well"):
        TrainConfig(**{option: value})


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = flags(small_config(tmp_path, "run", **TWO_STAGES))
    assert main([*config, "--out", str(tmp_path / "no" / "times.json")]) == 2
    assert "expected a file in a folder that exists" in capsys.readouterr().err
    assert main([*config, "--out", str(tmp_path)]) == 2
    assert "expected the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--baseline_steps", "9"], ["--lr_anneal_steps", "9"], ["--in_channels", "1"]])
def test_a_model_without_data_and_numbers_of_steps_is_measured(tmp_path: Path, given: list[str]) -> None:
    out = tmp_path / "times.json"
    model = {"image_size": 8, "num_channels": 8, "num_res_blocks": 1, "attention_resolutions": 8, "channel_mult": 1}
    options = [f"--{name}={value}" for name, value in (model | {"batch_size": 4, "groups": 2, "num_heads": 1}).items()]
    assert main([*options, *given, "--out", str(out), "--seconds", "0"]) == 0
    channels = {layer.in_channels for layer in LatencyTable.load(out).rows if layer.kind == "conv2d"}
    assert min(channels) == (1 if given[:1] == ["--in_channels"] else 3)
