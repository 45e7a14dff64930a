"""The paper's tables: what they compare, that they resume, and what the configurations at full scale would cost."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench.files import ROOT
from bench.paper import __main__ as command
from bench.paper import cost
from bench.paper.images import ImagesOptions
from bench.paper.recipes import STUDIES, Recipe, contestant
from bench.paper.run import cpu_minutes, protocol, run_rows
from bench.paper.summary import _score_against_loss, as_markdown, summarise
from bench.paper.tables import TABLES, Table, with_merged
from tdc_fast.evaluation.classifier import train_classifier
from tdc_fast.experiments import DemoOptions, measure
from tdc_fast.experiments.measure import load_reference
from tdc_fast.nn.merging import Merging
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.options import SearchOptions, TimeOptions, time_options

STUDY = STUDIES["digits"].scaled(0.01)
IN_TIME = STUDY.in_time(TimeOptions(budget_in="latency"))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_recipe_is_a_run_that_could_be_trained(study, table, tmp_path):
    keys = [recipe.key for recipe in table.rows]
    assert len(set(keys)) == len(keys) and table.rows[0].experts is None and table.rows[0].cost == 1
    for recipe in table.rows:
        first, model = contestant(study, recipe, 3, tmp_path)
        assert isinstance(model.config, TrainConfig) and model.config.seed == first.config.seed == 3
        if recipe.experts is None:
            assert str(first.directory) in model.config.resume_checkpoint
        else:
            assert model.config.base == str(first.directory) and model.config.total_share == recipe.cost


def test_equal_keys_mean_equal_runs(tmp_path):
    """A table may take another's result only if it would train the same."""
    configs: dict[str, dict] = {}
    for table in TABLES.values():
        for recipe in table.rows:
            config = contestant(STUDY, recipe, 0, tmp_path)[1].config.to_dict()
            assert configs.setdefault(recipe.key, config) == config


RESULTS = sorted((ROOT / "bench" / "results" / "paper").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_table_has_the_rows_and_the_question_that_its_command_makes_today(path):
    result = json.loads(path.read_text())
    table = TABLES[result["table"]]
    assert [row["label"] for row in result["rows"]] == [recipe.label for recipe in table.rows]
    assert result["question"] == table.question and path.stem == f"{table.name}-{result['study']}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    tdc = Recipe("tdc", "TDC", 0.8, experts={"budgets": "0.7,0.7,1,1"})
    rows = with_merged(Table("small", "Does it run?", (Recipe("uniform", "uniform, C"), tdc)), [1.5]).rows
    how = dataclasses.replace(protocol(STUDY, 64, 1), points_per_group=2, sampling_steps=3)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "train_classifier", lambda: train_classifier(epochs=2))
        outcomes = run_rows(IN_TIME, rows, range(2), folder, how, 0, said.append)
    again = run_rows(IN_TIME, rows, range(2), folder, how, 0, said.append)
    reference = load_reference(folder / "reference-64.pt")
    table = Table("small", "Does it run?", rows)
    environment = {"machine": "here", "torch": "2", "tdc_fast": "0"}
    minutes = cpu_minutes(IN_TIME, rows, range(2), folder)
    return outcomes, again, said, summarise(table, IN_TIME, outcomes, range(2), how, reference, environment, minutes)


def test_a_second_call_trains_nothing(outcome):
    outcomes, again, said, _ = outcome
    assert said[0].startswith("6 models") and said[1].startswith("0 models")
    assert [o.measured.distances for o in outcomes["tdc"]] == [o.measured.distances for o in again["tdc"]]


def test_costs_are_measured_macs_with_pruning_counted(outcome):
    outcomes, _, _, result = outcome
    phases = outcomes["tdc"][0].phases
    assert set(phases) == {"stage 1", "pruning", "stage 2"} and all(phases.values())
    uniform, tdc, _ = result["rows"]
    assert uniform["training_cost"] == 1 and tdc["training_cost"] == pytest.approx(0.8, abs=0.05)
    assert uniform["heldout_against_baseline"] == [0, 0] and tdc["sampling_cost"] < 1


def test_a_table_with_budgets_in_time_tells_the_sampling_time_beside_the_macs(outcome):
    _, _, _, result = outcome
    uniform, tdc, merged = result["rows"]
    assert uniform["sampling_time"] == merged["sampling_time"] == 1
    # By hand 0.7, 0.7, 1, 1 of the base's time; three steps, of which the groups of t = 0, 333 and 666 are taken.
    assert tdc["sampling_time"] == pytest.approx((0.7 + 0.7 + 1) / 3, abs=0.01) != tdc["sampling_cost"]
    text = as_markdown({**result, "date": "2000-01-01", "command": "x"})
    head, rule, row = (
        line for line in text.splitlines() if line.startswith("|") and "merged" not in line and "uniform" not in line
    )
    assert head.count("|") == rule.count("|") == row.count("|") and "| sampling MACs | sampling time |" in head
    assert f"| {tdc['sampling_cost']:.2f} | {tdc['sampling_time']:.2f} |" in row
    assert "Sampling time: estimated, as a share of the base's." in text
    rows = [{name: value for name, value in row.items() if name != "sampling_time"} for row in result["rows"]]
    plain = as_markdown({**result, "rows": rows, "date": "2000-01-01", "command": "x"})
    assert "time" not in plain.splitlines()[4] and plain.splitlines()[4].count("|") == plain.splitlines()[5].count("|")


def test_commands_of_experiments_have_the_flags_of_training_itself():
    for options in (SearchOptions, TrainConfig, DemoOptions, ImagesOptions, command.TablesOptions):
        assert issubclass(options, TimeOptions)
        assert all(name not in vars(options).get("__annotations__", {}) for name in time_options(TimeOptions()))


def test_a_study_in_time_prunes_in_time_and_has_files_of_its_own(tmp_path):
    options = TimeOptions(budget_in="latency", latency_table="t.json", width_step="auto")
    study = STUDY.in_time(options)
    assert (study.name, STUDY.in_time(TimeOptions()), study.tells_time) == ("digits-latency", STUDY, True)
    rows = {recipe.key: recipe for table in TABLES.values() for recipe in table.rows}
    configs = {key: contestant(study, rows[key], 0, tmp_path)[1].config for key in ("tdc", "one-pruned", "settings-n2")}
    assert {config.budget_in for config in configs.values()} == {"latency"}
    assert [config.latency_table for config in configs.values()] == ["t.json", "", ""]  # of 4 groups, 32 images
    flags = {"seeds": 1, "merged": "1,0.5"}
    said = command._command("main", command.TablesOptions(**flags, **time_options(options)))
    assert said.endswith("--scale 1.0 --merged 1,0.5 --budget_in latency --latency_table t.json --width_step auto")


def test_budgets_in_time_that_cannot_be_met_are_refused_before_anything_is_trained(tmp_path, capsys):
    flags = [
        "--study",
        "digits",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        "--budget_in",
        "latency",
    ]
    assert command.main(["settings", *flags]) == 2  # by the roofline; k = 0.4 allows the easiest group 0.55
    assert "error: k = 0.4: k: got 0.4; expected a larger one: the easiest group is allowed" in capsys.readouterr().err
    assert command.main(["main", *flags, "--latency_table", str(tmp_path / "none.json")]) == 2
    assert "none.json is not a valid latency table" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "table: got ''; expected one of main, stages"),
        (["main", "variants"], "table: got 'main variants'"),
        (["main", "--study", "cifar"], "study: got 'cifar'; expected one of digits, digits-wide"),
        (["main", "--seeds", "0"], "seeds: got 0"),
        (["main", "--samples", "1"], "samples: got 1"),
        (["main", "--scale", "nan"], "scale: got nan"),
        (["main", "--width_step", "0"], "width_step: got '0'"),
    ],
)
def test_wrong_options_of_a_table_are_refused_by_name(flags, said, tmp_path, capsys):
    assert command.main([*flags, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_merged_experts_have_rows_that_cost_their_training_and_sample_as_one_dense_model(outcome):
    _, _, _, result = outcome
    _, tdc, task = result["rows"]
    assert task["label"] == "TDC, merged, scale 1.5"
    assert task["training_cost"] == tdc["training_cost"] and task["sampling_cost"] == 1
    assert task["heldout_loss"] != tdc["heldout_loss"] and task["search_score"] == []


def test_rows_of_several_experts_alone_are_merged():
    table = with_merged(TABLES["main"], [1.0, 0.5])
    added = [recipe for recipe in table.rows if recipe.merging is not None]
    assert [recipe.run for recipe in added] == ["tdc-whole", "tdc-whole", "tdc", "tdc"]
    assert added[0].merging == Merging() and added[1].merging == Merging(method="task_arithmetic", scale=0.5)
    assert added[0].label == "TDC, whole experts, C, averaged" and len({recipe.key for recipe in table.rows}) == 12


def test_the_table_tells_every_seed_and_wins_are_counted_seed_by_seed(outcome):
    _, _, _, result = outcome
    tdc = result["rows"][1]
    assert len(tdc["heldout_loss"]) == len(tdc["frechet_distance"]) == 2
    assert tdc["better_on_loss"] == sum(value < 0 for value in tdc["heldout_against_baseline"])
    assert 0 < result["cpu_minutes"] < 30
    json.dumps(result, allow_nan=False)
    text = as_markdown({**result, "date": "2000-01-01", "command": "x"})
    assert f"| {tdc['better_on_loss']} / {tdc['better_on_frechet']} of 2 |" in text and "C is 40 uniform steps" in text
    assert "Seeds 0, 1; mean ± standard deviation over them." in text
    one = {**result, "seeds": [0], "date": "2000-01-01", "command": "x"}
    assert "\nSeed 0. C is" in as_markdown(one) and "over them" not in as_markdown(one)


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command continues where it was"),
        (ValueError("total_share: got 0.8"), 2, "error: total_share: got 0.8"),
    ],
)
def test_a_table_that_is_not_finished_ends_in_a_sentence(failure, status, said, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise failure

    monkeypatch.setattr(command, "run_rows", stop)
    assert command.main(["main", "--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == status
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_configurations_at_full_scale_say_that_they_were_not_run(capsys):
    for path in cost.CONFIGS.glob("*.yaml"):
        assert "NOT RUN" in path.read_text()
        assert TrainConfig.from_file(path).total_share == 0.8
    assert cost.main([str(cost.CONFIGS / "cifar10.yaml"), "--gpus", "4"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| cifar10 | 8.387 |" in line  # the published size of this denoiser


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (None, [], "an existing .yaml"),
        ("data_dir: digits", [], "plain: its cost follows from --groups N and --baseline_steps"),
        ("{groups: 4, stage1_steps: 9, stage2_steps: 9}", [], "plain: its cost follows from"),
        ("{groups: 4, baseline_steps: 9}", ["--gpus", "0"], "--gpus, --peak and --reached are above 0"),
    ],
)
def test_a_configuration_without_a_cost_is_refused_by_name(text, flags, said, tmp_path, capsys):
    path = tmp_path / "plain.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit):
        cost.main([str(path), *flags])
    assert said in capsys.readouterr().err


def test_the_score_of_a_search_is_held_against_the_loss_that_fine_tuning_leaves():
    def row(scores, losses):
        return {"search_score": scores, "heldout_loss": losses}

    rows = [row([], [9.0, 9.0]), row([1.0, 1.0], [1.0, 3.0]), row([2.0, 2.0], [2.0, 2.0]), row([3.0, 2.0], [7.0, 1.0])]
    assert _score_against_loss(rows) == pytest.approx([1.0, -(0.75**0.5)])  # the second seed has a tie
    assert _score_against_loss(rows[:3]) == []
