"""The study of one's own images: sized by measured times, with table and report, continued and not repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.paper import __main__ as command
from bench.paper import images, run
from bench.paper.images import ImagesOptions, run_images
from bench.paper.recipes import contestant, images_study
from bench.paper.run import protocol
from bench.paper.sizing import Pace, Paces, decide, least_steps
from bench.paper.tables import TABLES, variant, with_merged
from tdc_fast.experiments import measure
from tdc_fast.experiments.jobs import read_progress
from tdc_fast.experiments.measure import load_measured
from tdc_fast.pruning.latency import LatencyTable
from tdc_fast.pruning.latency.costs import all_layers
from tdc_fast.runs.build import outline_unet
from tdc_fast.runs.loading import load_run
from tdc_fast.training.latency import stage2_setting
from tests.bench import small_study

ROWS = TABLES["main"].rows
STUDY = images_study("there.npz", 128, 8000)
KEYS = [recipe.key for recipe in ROWS]
# Per step of C: half a step of stage 1, half or 0.3 of a uniform one, four times as many small ones, and experts.
# Pruned samples cost 0.85 of a whole one, so there are more of them.
STEPS = {
    "uniform": 0.5,
    "uniform-80": 0.3,
    "uniform-small": 2,
    "uniform-small-80": 1.2,
    "one": 2,
    "one-pruned": 1.2 / 0.85,
    "tdc-whole": 0.5,
    "tdc": 0.3 / 0.85,
}
ROW_PACES = {key: Pace(0.02, 2.0) for key in {*KEYS, *small_study.TRAINED}}
PACES = Paces(Pace(0.01, 1.0), ROW_PACES, reference=3.0, measuring=4.0, elapsed=5.0)
FIXED = 5 + 3 + 1 + 8 * (2 + 4)
PER_STEP = 0.5 * 0.01 + 0.02 * sum(STEPS.values())


def test_minutes_are_divided_by_the_measured_times():
    sizing = decide(STUDY, ROWS, PACES, 30, 160)
    assert sizing.baseline_steps == int((30 * 60 * 0.9 - FIXED) / PER_STEP)
    assert sizing.seconds == pytest.approx(30 * 60 * 0.9, abs=PER_STEP)
    assert sizing.steps == {key: round(share * sizing.baseline_steps) for key, share in STEPS.items()}


def test_the_steps_that_are_divided_are_those_of_the_runs(tmp_path):
    sizing = decide(STUDY, ROWS, PACES, 30, 160)
    study = images_study("there.npz", 128, sizing.baseline_steps)
    for recipe in ROWS:
        config = contestant(study, recipe, 0, tmp_path)[1].config
        if not config.groups:
            steps = config.lr_anneal_steps - config.lr_anneal_start
            assert steps == pytest.approx(sizing.steps[recipe.key], abs=4)
    assert contestant(study, ROWS[5], 0, tmp_path)[1].config.budgets == "0.85"


def test_too_few_minutes_are_refused_with_the_least_that_is_enough():
    with pytest.raises(ValueError, match=r"minutes: got 2; expected at least (\d+\.\d)") as refused:
        decide(STUDY, ROWS, PACES, 2, 1000)
    enough = float(str(refused.value).split("at least ")[1].split(":")[0])
    assert decide(STUDY, ROWS, PACES, enough, 1000).baseline_steps >= 1000
    with pytest.raises(ValueError, match="minutes"):
        decide(STUDY, ROWS, PACES, enough - 0.2, 1000)


def test_the_least_number_of_steps_sees_every_image_and_leaves_room_for_pruning():
    assert least_steps(STUDY, 6058) == 20 * 48
    assert least_steps(STUDY, 10**6) == 2000
    assert least_steps(STUDY, 100) == 160


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> ImagesOptions:
    return small_study.options_in(tmp_path_factory.mktemp("images"), "cpu")


@pytest.fixture(scope="module")
def in_time(options) -> ImagesOptions:
    """With budgets in the time of a table."""
    config = contestant(images._study(options, small_study.STEPS), variant("shared"), 0, Path(options.out))[1].config
    layers = all_layers(outline_unet(config, 3), torch.zeros(1, 3, 8, 8), {})
    rows = {layer: 100 + layer.live_in * layer.live_out * layer.height for layer in layers}
    path = Path(options.data_dir).with_name("times.json")
    LatencyTable(stage2_setting(config, config.groups), rows).save(path)
    return replace(options, budget_in="latency", latency_table=str(path))


@pytest.fixture(scope="module")
def finished(in_time) -> tuple[Path, list[Paces]]:
    return Path(in_time.out), small_study.run(in_time, PACES)


@pytest.fixture(scope="module")
def numbers(finished) -> dict:
    return json.loads((finished[0] / "report.json").read_text())


def test_every_kind_of_run_is_timed(finished):
    out, (paces,) = finished
    assert list(paces.rows) == small_study.TRAINED
    for pace in (paces.stage1, *paces.rows.values()):
        assert 0 < pace.step < paces.elapsed and 0 <= pace.fixed < paces.elapsed
    assert paces.rows["uniform"] == paces.rows["uniform-80"] != paces.rows["uniform-small-80"]
    assert paces.measuring > 0 and not (out / "warmup").exists()
    assert {key for key, pace in paces.rows.items() if pace.macs} == {"one", "tdc", *small_study.VARIANTS.values()}
    assert paces.rows["one"].macs == paces.rows["variant-slope-whole"].macs == 1 > paces.rows["tdc"].macs > 0.5


def test_experts_whose_budgets_are_in_time_have_the_steps_that_their_macs_allow():
    paces = replace(PACES, rows={**ROW_PACES, "tdc": Pace(0.02, 2.0, macs=0.5)})
    sizing = decide(STUDY, ROWS, paces, 30, 160)
    assert sizing.steps["tdc"] == round(0.3 / 0.5 * sizing.baseline_steps)


def test_budgets_in_time_are_told_beside_macs_in_table_and_report(finished, numbers):
    out, _ = finished
    plan = numbers["widths"]
    assert plan["time_budgets"] == pytest.approx([1, 0.8], abs=0.01) and plan["times"][1] <= plan["time_budgets"][1]
    assert numbers["models"]["tdc"]["sampling_time"] == pytest.approx((plan["times"][0] + plan["times"][1]) / 2)
    assert numbers["models"]["tdc" + small_study.MERGED]["sampling_time"] == 1
    assert "| sampling MACs | sampling time | held-out loss |" in (out / "main-images.md").read_text()
    assert "(k = 0.6 of the base&#x27;s time)" in (out / "report.html").read_text()


def test_all_models_are_trained_at_the_cost_they_stand_for(numbers):
    assert list(numbers["models"]) == small_study.KEYS
    for recipe in (*small_study.TABLE.rows, *map(variant, small_study.VARIANTS)):
        model = numbers["models"][recipe.key]
        # Experts stop at the last whole step within their budget, pruning included.
        assert recipe.cost - 1 / 64 <= model["training_cost"] <= recipe.cost + 1 / 64
        assert len(model["frechet_distance"]["draws"]) == 2 and model["heldout_loss"]["num_images"] == 8
        assert (model["sampling_cost"] < 1) == (recipe.key in ("tdc", "variant-shared-pairs"))


def test_merged_experts_stand_beside_their_own_in_table_and_report(finished, numbers):
    """Trained by the same run, sampled as one dense denoiser, and timed for nothing but their measuring."""
    rows = {row["label"]: row for row in json.loads((finished[0] / "main-images.json").read_text())["rows"]}
    tdc, dense = rows["TDC, pruned, 0.8 C"], rows["TDC, pruned, 0.8 C, merged, scale 1.5"]
    assert dense["training_cost"] == tdc["training_cost"] and tdc["sampling_cost"] < 1 == dense["sampling_cost"]
    model = numbers["models"]["tdc" + small_study.MERGED]
    assert model["heldout_loss"]["mean"] == dense["heldout_loss"][0] != tdc["heldout_loss"][0]
    assert "by task arithmetic, scale 1.5: the same training" in (finished[0] / "report.html").read_text()
    shown = finished[0] / "runs/seed0/tdc/samples" / f"tdc{small_study.MERGED}-24x2"
    assert (shown / "samples_24x8x8x3.png").is_file()


def test_merged_experts_take_the_time_of_measuring_alone():
    rows = with_merged(TABLES["main"], [1.0, 0.5, 1.0]).rows
    without, sizing = decide(STUDY, ROWS, PACES, 30, 160), decide(STUDY, rows, PACES, 30, 160)
    assert len(rows) == 12 and sizing.steps.keys() == without.steps.keys()
    lost = without.baseline_steps - sizing.baseline_steps
    assert lost == pytest.approx(4 * PACES.measuring / PER_STEP, abs=1)


def test_variants_are_runs_with_their_option_and_as_many_experts_as_asked_for(finished):
    runs = finished[0] / "runs" / "seed0"
    shared, slope = (load_run(runs / key) for key in small_study.VARIANTS.values())
    assert shared.config.groups == slope.config.groups == 2 and shared.config.k == 0.6 and slope.config.k == 1
    assert shared.experts().shared["input_blocks.0.0"] == (0, 0) and slope.experts().shared == {}
    rows = read_progress(runs / "variant-slope-whole" / "experts" / "progress.csv")
    assert rows[0]["share_g0"] == "0.5" != rows[-1]["share_g0"]  # the first slope is seen after four steps
    assert "--stage2_slope_windows 32" in (finished[0] / "report.html").read_text()


def test_a_variant_is_tdc_with_one_option_pruned_or_whole(tmp_path):
    study = images_study("there.npz", 128, 8000, groups=8)
    rates = contestant(study, variant("whole-lr-high-snr"), 0, tmp_path)[1].config
    assert rates.stage2_lr_factors == "1,0.905724,0.820335,0.742997,0.67295,0.609507,0.552045,0.5"
    assert (rates.groups, rates.k, rates.total_share, rates.stage2_batch) == (8, 1.0, 1.0, 128)
    assert contestant(study, variant("shared-level0"), 0, tmp_path)[1].config.shared_layers == "level0"
    assert study.small_batch == 16 and decide(study, ROWS, PACES, 30, 160).baseline_steps > 160


def test_the_folder_holds_samples_of_every_model_the_table_and_the_report(finished):
    out, _ = finished
    for key in small_study.TRAINED:
        assert (out / "runs" / "seed0" / key / "samples" / "samples_24x8x8x3.png").is_file()
    assert "| TDC, pruned, 0.8 C |" in (out / "main-images.md").read_text()
    sizing = json.loads((out / "main-images.json").read_text())["sizing"]
    assert sizing["decided"]["baseline_steps"] == 64 and sizing["measured"]["rows"]["tdc"]["step"] > 0
    page = (out / "report.html").read_text()
    assert page.count('class="grid"') == len(small_study.KEYS) + 1 and "small batches alone help" in page
    assert load_run(out / "runs" / "seed0" / "tdc").config.precision == "fp32"


def test_models_that_were_trained_in_bf16_are_measured_in_it(finished, options, tmp_path, monkeypatch):
    runs = finished[0] / "runs"
    before = load_measured(runs / "seed0" / "measured" / "tdc-24x2.pt")
    trained = measure.from_run(runs / "seed0" / "tdc")
    half = replace(trained, config=trained.config.replace(precision="bf16"))
    monkeypatch.setattr(measure, "from_run", lambda _: half)
    monkeypatch.setattr(measure, "load_run", lambda _: load_run(runs / "seed0" / "tdc"))
    how = replace(protocol(STUDY, 24, 1), sampling_steps=4, points_per_group=2)
    measure.measure(tmp_path, runs / "reference-24.pt", how, tmp_path / "half.pt")
    after = load_measured(tmp_path / "half.pt")
    assert (
        after.heldout.mean == pytest.approx(before.heldout.mean, rel=1e-2) and after.heldout.mean != before.heldout.mean
    )
    assert after.macs_per_image == before.macs_per_image and after.parameters == before.parameters


def test_a_second_call_goes_on_with_what_was_decided(finished, numbers, in_time, monkeypatch, capsys):
    for name in ("warm_up", "decide"):
        monkeypatch.setattr(images, name, lambda *_: pytest.fail("sized again"))
    monkeypatch.setattr(images, "TABLE", small_study.TABLE)
    monkeypatch.setattr(run, "run_jobs", lambda jobs, *_: pytest.fail("trained again") if jobs else {})
    run_images(in_time, in_process=True)
    again = json.loads((finished[0] / "report.json").read_text())
    assert {**again, "seconds": {}} == {**numbers, "seconds": {}}
    said = capsys.readouterr().out
    assert "continuing the study" in said and "C is 64 steps of 8 images" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"minutes": 2}, "minutes: got 2; expected 1"),
        ({"num_channels": 8}, "num_channels: got 8; expected 4"),
        ({"budget_in": "macs"}, "budget_in: got 'macs'; expected 'latency'"),
    ],
)
def test_other_settings_are_refused_by_name(changes, said, finished, in_time):
    with pytest.raises(ValueError, match=said):
        run_images(replace(in_time, **changes), in_process=True)


@pytest.mark.parametrize("text", [None, "{}", '{"decided": {"steps": 3}}', "[1]"])
def test_a_folder_whose_decision_is_damaged_is_refused_by_name(text, options, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(images._recorded(options)))
    if text is not None:
        (tmp_path / "sizing.json").write_text(text)
    with pytest.raises(ValueError, match=r"sizing\.json"):
        run_images(replace(options, out=str(tmp_path)), in_process=True)
    assert not (tmp_path / "runs").exists()


def test_after_too_few_minutes_the_same_folder_takes_more(options, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "warm_up", lambda *_: (tmp_path / "out" / "warmup").mkdir(parents=True) or PACES)
    few = replace(options, out=str(tmp_path / "out"), minutes=0.5)
    with pytest.raises(ValueError, match=r"minutes: got 0\.5; expected at least"):
        run_images(few, in_process=True)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(images, "run_rows", lambda study, *_: pytest.fail(f"C {study.baseline_steps}"))
    with pytest.raises(pytest.fail.Exception, match=r"C \d{4}"):
        run_images(replace(few, minutes=30), in_process=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size", "6"], "batch_size: got 6"),
        (["--data_dir", "nowhere"], "data_dir: got 'nowhere'"),
        (["--minutes", "-1"], "minutes: got -1"),
        (["--minutes", "0"], "minutes: got 0"),
        (["--groups", "3"], "batch_size: got 128; expected a multiple of --groups 3"),
        (["--merged", "1,x"], "merged: got '1,x'"),
        (["--variants", "shared,sharp"], "variants: got 'sharp'; expected shared, shared-pairs"),
        (["--channel_mult", "1,2,2,2,2"], "channel_mult"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(flags, said, options, tmp_path, capsys):
    out = tmp_path / "out"
    base = ["--study", "images", "--data_dir", options.data_dir, "--image_size", "8", "--channel_mult", "1,2"]
    assert command.main(["main", *base, "--device", "cpu", "--out", str(out), *flags]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_an_unreadable_image_is_refused_by_name_or_left_out(options, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    corrupt = replace(options, data_dir=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"broken\.png"):
        run_images(corrupt, in_process=True)
    study = images._study(replace(corrupt, on_corrupt="skip"), 64)
    assert images._training_images(study, TABLES["main"], corrupt) == 10  # of 12, a fifth of which is held out
    measure.prepare_reference(tmp_path / "reference.pt", 4, *study.dataset)
    assert np.array_equal(
        sorted(measure.load_reference(tmp_path / "reference.pt").images.sum(dim=(1, 2, 3)).tolist()),
        sorted(pixels.sum(axis=(1, 2, 3)).tolist()),
    )
    assert not (tmp_path / "out").exists()


def test_the_command_beside_a_table_can_be_pasted_into_a_shell():
    said = images._command(ImagesOptions(data_dir="my photos", attention_resolutions=""))
    assert said.endswith("--study images --data_dir 'my photos' --attention_resolutions ''")


def test_only_the_main_table_has_this_study(capsys):
    assert command.main(["agents", "--study", "images"]) == 2
    assert "table: got 'agents'" in capsys.readouterr().err
