"""The demo in miniature: complete, honest about cost, the same twice, and continued rather than repeated."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tdc_fast import demo, merge
from tdc_fast.evaluation.classifier import train_classifier
from tdc_fast.experiments import DemoOptions, jobs, measure, run_demo
from tdc_fast.experiments.contestants import contestants
from tdc_fast.nn.merging import expert_states
from tdc_fast.pruning.latency import LatencyTable
from tdc_fast.pruning.latency.costs import all_layers
from tdc_fast.runs.build import outline_unet
from tdc_fast.runs.denoisers import from_run
from tdc_fast.runs.loading import load_run
from tdc_fast.runs.options import time_options
from tdc_fast.runs.weights import load_verified
from tdc_fast.training.latency import stage2_setting

TINY = DemoOptions(scale=0.02, samples=60, draws=2, sampling_steps=2, loss_points=1)


@pytest.fixture(scope="module")
def one_thread():
    """The demo's own setting; the numbers of a module-scoped run must not depend on the machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> DemoOptions:
    """With budgets in the time of a table in which layers take longer on large images than their MACs say."""
    folder = tmp_path_factory.mktemp("demo")
    config = contestants(folder, 60, 0, control=False)[-1].config
    layers = all_layers(outline_unet(config, 1), torch.zeros(1, 1, 8, 8), {})
    rows = {layer: 100 + layer.live_in * layer.live_out * layer.height for layer in layers}
    LatencyTable(stage2_setting(config, config.groups), rows).save(folder / "times.json")
    in_time = {"budget_in": "latency", "latency_table": str(folder / "times.json")}
    return replace(TINY, out=str(folder / "out"), **in_time)


@pytest.fixture(scope="module")
def finished(options, one_thread) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "train_classifier", lambda: train_classifier(epochs=2))
        run_demo(options, in_process=True)
    return Path(options.out)


@pytest.fixture(scope="module")
def numbers(finished) -> dict:
    return json.loads((finished / "report.json").read_text())


def test_every_model_is_trained_at_the_cost_it_stands_for(numbers):
    cost = {key: model["training_cost"] for key, model in numbers["models"].items()}
    assert cost["uniform"] == 1
    assert cost["uniform-80"] == pytest.approx(0.8)
    assert cost["uniform-80-small"] == pytest.approx(0.8)
    # Experts stop at the last whole step within their budget, pruning included.
    step = 1 / numbers["models"]["uniform"]["steps"]["uniform training"]
    assert 1 - step < cost["experts"] <= 1
    assert 0.8 - step < cost["pruned"] <= 0.8
    assert numbers["models"]["pruned"]["training_macs_by_phase"]["pruning"] > 0


def test_the_first_stage_is_shared(numbers):
    shared = {model["training_macs_by_phase"]["stage 1"] for model in numbers["models"].values()}
    assert len(shared) == 1
    first_points = [model["loss_curve"]["losses"][0][0] for model in numbers["models"].values()]
    assert len(set(first_points)) == 1


def test_pruned_experts_cost_less_per_image_and_whole_ones_the_same(numbers):
    cost = {key: model["sampling_cost"] for key, model in numbers["models"].items()}
    assert cost["experts"] == cost["uniform"] == 1
    assert 0.7 < cost["pruned"] < 1


def test_budgets_in_time_are_met_and_the_report_tells_time_beside_macs(finished, numbers):
    plan, models = numbers["widths"], numbers["models"]
    assert plan["budgets"] == [] and plan["time_budgets"] == pytest.approx([1, 0.9, 0.8, 0.7], abs=1e-3)
    pairs = zip(plan["time_budgets"], plan["times"], strict=True)
    assert all(0.99 * budget <= time <= budget for budget, time in pairs) and plan["macs"] != plan["times"]
    assert models["uniform"]["sampling_time"] == models["experts"]["sampling_time"] == 1
    # Two steps, at t = 0 and 500: those of experts 0 and 2.
    assert models["pruned"]["sampling_time"] == pytest.approx((plan["times"][0] + plan["times"][2]) / 2)
    page = (finished / "report.html").read_text()
    assert "<th>cost per image</th><th>time per image</th>" in page and "(k = 0.6 of the base&#x27;s time)" in page
    assert "<th>MACs / base</th><th>time / base</th><th>budget in time</th>" in page
    row = f"<td>{plan['macs'][2]:.4f}</td><td>{plan['times'][2]:.4f}</td><td>{plan['time_budgets'][2]:.4f}</td>"
    assert row in page and numbers["settings"]["experts"]["budget_in"] == "latency"


def test_all_are_measured_alike(numbers):
    for model in numbers["models"].values():
        assert model["frechet_distance"]["n"] == 60
        assert len(model["frechet_distance"]["draws"]) == 2
        assert model["heldout_loss"]["num_images"] == 359
        assert len(model["heldout_loss"]["per_group"]) == 4


def test_runs_and_samples_are_left_behind(finished):
    assert (finished / "report.html").stat().st_size > 100_000
    for key in ("uniform", "experts", "pruned"):
        assert (finished / key / "samples" / "samples_60x8x8x1.npz").is_file()
    assert (finished / "pruned" / "widths.json").is_file()


@pytest.mark.parametrize("missing", ["base", "zero"])
def test_experts_are_merged_into_one_dense_model_from_the_averages_that_are_sampled(finished, tmp_path, missing):
    run, out = finished / "pruned", tmp_path / "merged.pt"
    flags = ["--weights", "1,2,3,4", "--missing", missing]
    assert merge.main(["--run", str(run), *flags, "--out", str(out)]) == 0
    states = expert_states(from_run(run, "experts").model, load_run(run).base(), missing)
    merged = load_verified(out)
    assert merged.keys() == states[0].keys()
    for name, value in merged.items():
        expected = sum(share * state[name] for share, state in zip((0.1, 0.2, 0.3, 0.4), states, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    raw = load_run(run).experts(ema=False)  # other weights, so that the wrong ones would show
    assert not torch.equal(raw.expert_state(0)["out.2.weight"], states[0]["out.2.weight"])


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("experts", ["--weights", "1,2"], "weights: .*each of the 4 experts"),
        ("experts", ["--base", "base.pt"], "base: .*none together with --run"),
        ("experts", ["--num_channels", "16"], "num_channels: got 16; expected 4"),
        ("uniform", [], "experts: .*a run with --groups N"),
    ],
)
def test_experts_that_cannot_be_merged_so_are_refused(finished, tmp_path, capsys, run, flags, message):
    assert merge.main(["--run", str(finished / run), *flags, "--out", str(tmp_path / "merged.pt")]) == 2
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_a_second_call_keeps_what_is_finished(finished, options, numbers, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(jobs, "measure", lambda *_: pytest.fail("measured again"))
    checkpoints = sorted(finished.glob("**/ema_*.pt"))
    before = [path.stat().st_mtime_ns for path in checkpoints]
    run_demo(options, in_process=True)
    assert sorted(finished.glob("**/ema_*.pt")) == checkpoints
    assert [path.stat().st_mtime_ns for path in checkpoints] == before
    again = json.loads((finished / "report.json").read_text())
    assert {**again, "seconds": {}} == {**numbers, "seconds": {}}
    assert "continuing" in capsys.readouterr().out


def test_one_model_made_again_elsewhere_has_the_same_numbers(finished, options, numbers, tmp_path, one_thread):
    from tdc_fast.experiments.contestants import stage1
    from tdc_fast.experiments.demo import FULL_STEPS
    from tdc_fast.experiments.measure import MeasuringProtocol, load_measured

    out, steps = tmp_path / "again", round(FULL_STEPS * TINY.scale)
    jobs.train_contestant(stage1(out, steps, 0))
    models = contestants(out, steps, 0, control=False, time=time_options(options))
    pruned = next(model for model in models if model.key == "pruned")
    protocol = MeasuringProtocol(
        draws=2, samples=60, sampling_steps=2, points_per_group=1, boundaries=(0, 250, 500, 750, 1000)
    )
    jobs.train_and_measure(pruned, finished / "measured" / "reference.pt", protocol, out / "pruned.pt")
    measured = load_measured(out / "pruned.pt")
    first = numbers["models"]["pruned"]
    assert list(measured.distances) == first["frechet_distance"]["draws"]
    assert list(measured.heldout.per_group) == first["heldout_loss"]["per_group"]


def test_a_folder_of_another_demo_or_with_other_files_is_refused(finished, options, tmp_path, capsys):
    with pytest.raises(ValueError, match="seed: got 7; expected 0"):
        run_demo(replace(options, seed=7), in_process=True)
    with pytest.raises(ValueError, match="budget_in: got 'macs'; expected 'latency'"):
        run_demo(replace(options, budget_in="macs"), in_process=True)
    older = json.loads((finished / "demo.json").read_text())  # of a release without budgets in time
    for name in time_options(options):
        del older[name]
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "demo.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="budget_in: got 'latency'; expected 'macs'"):
        run_demo(replace(options, out=str(tmp_path / "older")), in_process=True)
    shutil.rmtree(tmp_path / "older")
    (tmp_path / "notes.txt").write_text("mine")
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: out: got")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--scale", "0"), ("--samples", "1"), ("--draws", "0"), ("--width_step", "8.5"), ("--budget_in", "seconds")],
)
def test_impossible_options_are_refused_before_anything_is_written(flag, value, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "out"), flag, value]) == 2
    assert capsys.readouterr().err.startswith((f"error: {flag[2:]}: got", f"error: invalid choice '{value}'"))
    assert not (tmp_path / "out").exists()


def test_a_table_of_times_that_does_not_fit_is_refused_before_anything_is_written(options, tmp_path, capsys):
    table = LatencyTable.load(options.latency_table)
    other, slow = tmp_path / "other.json", tmp_path / "slow.json"
    replace(table, setting=replace(table.setting, batch=64)).save(other)
    replace(table, rows=dict.fromkeys(table.rows, 1000)).save(slow)  # which no width makes faster
    out = ["--out", str(tmp_path / "out"), "--budget_in", "latency", "--latency_table"]
    for path, said in ((other, "batch: got 64; expected 32, as in this run"), (slow, "k: got 0.6; expected a larger")):
        assert demo.main([*out, str(path)]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
