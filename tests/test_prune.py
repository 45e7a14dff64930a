"""The command that searches widths: on a finished stage 1, on weights from elsewhere, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tdc_fast.training.pruning as pruning_phase
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.prune import main, prune_run
from tdc_fast.pruning.latency import LatencyTable, unit_latencies
from tdc_fast.pruning.latency.costs import all_layers
from tdc_fast.pruning.memory import read_trials, searches_of
from tdc_fast.runs.build import build_data, outline_unet
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.train import TrainConfig, train
from tdc_fast.train import main as train_command
from tdc_fast.training import load_run
from tdc_fast.training.latency import stage2_setting
from tdc_fast.training.messages import describe_plan, describe_widths
from tests.training.small_run import SETTINGS, TWO_STAGES, flags, small_config, write_images

SEARCH = ["--rounds", "2", "--candidates", "3", "--progress", "never"]


@pytest.fixture(scope="module")
def finished_stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small_config(tmp_path_factory.mktemp("runs"), "stage1", **TWO_STAGES, stop_after="stage1")).path


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the search of so small a net."""
    monkeypatch.setattr(pruning_phase, "draw_search", lambda *_: None)


@pytest.fixture
def run(finished_stage1: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_stage1, tmp_path / "run")
    return tmp_path / "run"


def test_weights_that_a_run_does_not_have_yet_are_refused_with_the_command_that_trains_them(
    finished_stage1: Path,
) -> None:
    run = load_run(finished_stage1)
    with pytest.raises(ValueError, match=f"expected a run with weights of its experts; .* --resume {finished_stage1}"):
        run.experts()
    with pytest.raises(ValueError, match=r"step: got 3; expected one of which .*base has weights: .*10"):
        run.base(step=3)


def test_a_finished_stage_1_is_searched_by_itself_and_stage_2_takes_the_widths(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--run", str(run), "--agent", "tpe", *SEARCH]) == 0
    shown = capsys.readouterr().out
    assert "group 2 (t 40 to 59), after round 2: 6 candidates scored" in shown
    assert f"python -m tdc_fast.train --resume {run}" in shown
    plan = WidthPlan.load(run / "widths.json")
    trials = read_trials(run / "memory.jsonl")
    assert {trial.group for trial in trials} == {1, 2} and {trial.agent for trial in trials} == {"tpe"}
    for group in (1, 2):
        best = min((trial for trial in trials if trial.group == group), key=lambda trial: trial.score)
        assert plan.expert_widths(group) == best.widths
        assert 0.99 * plan.budgets[group] <= plan.macs[group] <= plan.budgets[group]
    phase = json.loads((run / "macs.json").read_text())["phases"]["pruning"]
    assert phase["agent"] == "tpe" and phase["macs"] > sum(trial.spent for trial in trials) > 0
    for picture in ("search.png", "widths.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    train(TrainConfig.from_file(run / "config.json").replace(run_dir=str(run), resume="latest"))
    assert load_run(run).experts().widths == plan
    assert main(["--run", str(run), "--agent", "tpe", *SEARCH]) == 2
    refused = capsys.readouterr().err
    assert "experts with checkpoints" in refused and f"--base {run} --run_dir NEW" in refused
    assert WidthPlan.load(run / "widths.json") == plan


@pytest.mark.usefixtures("without_pictures")
def test_a_run_is_searched_in_time_with_a_table_of_its_own_setting(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = load_run(run).config
    base, x = outline_unet(config, 1), torch.zeros(1, 1, 8, 8)
    rows = {layer: 10 + layer.live_in * layer.live_out for layer in all_layers(base, x, {})}
    table = LatencyTable(stage2_setting(config, 3), rows)
    for name, changes in {
        "own": {},
        "other": {"setting": dataclasses.replace(table.setting, batch=7)},
        "foreign": {"backends": {"conv2d": ("triton",)}},
    }.items():
        dataclasses.replace(table, **changes).save(tmp_path / f"{name}.json")
    in_time = ["--run", str(run), "--progress", "never", "--budget_in", "latency", "--latency_table"]
    assert main([*in_time, str(tmp_path / "other.json")]) == 2
    assert "other.json: batch: got 7; expected 6, as in this run" in capsys.readouterr().err
    assert main([*in_time, str(tmp_path / "foreign.json")]) == 2
    assert "foreign.json: backend of conv2d: got 'triton'; expected" in capsys.readouterr().err
    assert main([*in_time, str(tmp_path / "own.json")]) == 0
    costs = unit_latencies(base, x, {}, table)
    plan = WidthPlan.load(run / "widths.json")
    assert plan.budgets == () and plan.latency_budgets[0] == costs.full() > plan.latency_budgets[2]
    for group in range(3):
        assert plan.latency[group] == costs.total(plan.expert_widths(group)) <= plan.latency_budgets[group]
    assert f"{plan.latency[2] / costs.full():.4f} of its estimated time" in capsys.readouterr().out
    assert json.loads((run / "macs.json").read_text())["phases"]["pruning"]["budget_in"] == "latency"
    opened = RunDirectory.open(run)
    assert "ms a batch, estimated (budgets " in describe_widths(opened, plan)
    said = describe_plan(opened, build_data(config))  # that of the run's own options until it was pruned
    assert f"k = 0.7 of the base's time (measured in {tmp_path / 'own.json'}), agent auto, rounds: 1" in said
    assert main(["--run", str(run), "--progress", "never", "--agent", "taylor"]) == 0
    assert "k = 0.7, agent taylor, rounds: 1" in describe_plan(opened, build_data(config))


@pytest.mark.usefixtures("without_pictures")
def test_a_search_that_was_cut_off_goes_on_to_the_same_files(run: Path) -> None:
    shutil.copytree(run, run.parent / "other")
    prune_run(run, agent="evolution", rounds=2, candidates=3, progress="never")
    lines = (run / "memory.jsonl").read_bytes().splitlines(keepends=True)
    (run.parent / "other" / "memory.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:20])
    prune_run(run.parent / "other", agent="evolution", rounds=2, candidates=3, progress="never")
    for name in ("memory.jsonl", "widths.json", "macs.json"):
        assert (run / name).read_bytes() == (run.parent / "other" / name).read_bytes()


def test_another_search_keeps_the_memory_of_the_first_and_is_drawn_beside_it(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    prune_run(run, agent="random", rounds=1, candidates=3, progress="never")
    first = (run / "memory.jsonl").read_bytes()
    prune_run(run, agent="random", rounds=2, candidates=3, progress="never")  # more rounds add to it
    assert (run / "memory.jsonl").read_bytes() != first and not (run / "memory.1.jsonl").exists()
    prune_run(run, agent="evolution", rounds=1, candidates=3, progress="never")
    assert "kept as memory.1.jsonl" in capsys.readouterr().out
    assert (run / "memory.1.jsonl").read_bytes().startswith(first.splitlines(keepends=True)[0])
    assert list(searches_of(run)) == ["random", "evolution"]
    assert (run / "agents.png").read_bytes().startswith(b"\x89PNG")
    before = (run / "widths.png").read_bytes()
    prune_run(run, agent="taylor", progress="never")  # scores nothing: the picture of the other search goes
    assert not (run / "search.png").exists() and (run / "widths.png").read_bytes() != before


@pytest.mark.usefixtures("without_pictures")
def test_weights_of_improved_diffusion_and_their_flags_are_enough(tmp_path: Path) -> None:
    write_images(tmp_path)
    torch.manual_seed(0)
    model = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, channel_mult="1,2", num_heads=2, attention_resolutions="4",
        in_channels=1,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), tmp_path / "ema_0.9999_000010.pt")
    config = small_config(
        tmp_path, "new", groups=3, k=0.7, stage2_steps=4, calibration_batches=1, agent="greedy", rounds=2,
        candidates=2, base=str(tmp_path / "ema_0.9999_000010.pt"),
    )  # fmt: skip
    assert main(flags(config)) == 0
    memory, widths = tmp_path / "new" / "memory.jsonl", tmp_path / "new" / "widths.json"
    assert {trial.agent for trial in read_trials(memory)} == {"greedy"}
    whole = memory.read_bytes(), widths.read_bytes()
    widths.unlink()
    memory.write_bytes(whole[0][: len(whole[0]) // 2])
    assert main(flags(config)) == 0  # the same command goes on after a kill
    assert (memory.read_bytes(), widths.read_bytes()) == whole
    assert main(flags(config.replace(k=0.8))) == 2  # and leaves another run alone
    assert (memory.read_bytes(), widths.read_bytes()) == whole
    resumed = train(TrainConfig.from_file(tmp_path / "new" / "config.json").replace(resume="latest"))
    assert load_run(resumed.path).steps("experts")[-1] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere"),
        (["--run", "RUN", "--k", "0.5"], "k: got 0.5"),
        (["--run", "RUN", "--num_channels", "16"], "num_channels: got 16"),
        (["--run", "RUN", "--rounds", "0"], "rounds: got 0"),
        (["--run", "RUN", "--run_dir", "elsewhere"], "run_dir: got 'elsewhere'"),
        (["--run", "RUN", "--agent", "llm"], "llm_model"),
        (["--run", "RUN", "--agent", "llm", "--llm_model", "m", "--llm_url", "http://a:b@c"], "llm_url"),
        (["--run", "RUN", "--agent", "taylor", "--importance", "magnitude"], "importance: got|agent: got"),
        ([*flags(TrainConfig(**{**SETTINGS, **TWO_STAGES})), "--data_dir", "digits"], "--base FILE"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (run / "widths.json").exists()


def test_a_stage_1_that_is_not_finished_is_refused_with_the_command_that_finishes_it(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    (run / "base" / "state000010.json").unlink()
    assert main(["--run", str(run), "--agent", "random"]) == 2
    said = capsys.readouterr().err
    assert "step 8 of 10" in said
    assert train_command(said.partition("python -m tdc_fast.train ")[2].partition(" trains it")[0].split()) == 0
    assert (run / "base" / "state000010.json").is_file() and not (run / "experts").exists()


def test_a_plain_run_is_refused_with_the_command_that_makes_it_a_base(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = train(small_config(tmp_path, "plain", lr_anneal_steps=4)).path
    assert main(["--run", str(plain)]) == 2
    assert "--base DIR --run_dir NEW --config DIR/config.json --groups N" in capsys.readouterr().err
    arguments = ["--base", plain, "--run_dir", tmp_path / "new", "--config", plain / "config.json"]
    assert main([*map(str, arguments), "--groups", "2", "--stage2_steps", "4", "--calibration_batches", "1"]) == 0
    assert (tmp_path / "new" / "widths.json").is_file()


def test_a_missing_library_is_missed_before_stage_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"tdc_fast\[search\]"):
        train(small_config(tmp_path, "run", **TWO_STAGES, rounds=2))
    assert not (tmp_path / "run").exists()


def test_help_is_grouped_and_has_the_search_first(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"{section} options") for section in ("prune", "search", "data", "tdc")]
    assert places == sorted(places)


def test_the_agent_in_the_documentation_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
    text = (Path(__file__).resolve().parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Exchange" in b]
    body = block[block.index("class") : block.index("model =")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
    names: dict[str, Any] = {}
    exec(compile(block, "docs/method.md", "exec"), names)
    trials = names["found"].trials[1]
    assert len(trials) == 32 and trials[0].agent == "exchange"
    bests = [min(t.score for t in trials if t.round <= number) for number in range(4)]
    first = min((t for t in trials if t.round == 0), key=lambda trial: trial.score)
    assert trials[8].widths == first.widths and bests[-1] <= bests[0]
