"""Labels dropped for classifier-free guidance: by the training step alone, remembered by the run, used by sampling."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_fast import sample
from tdc_fast.data.dataset import ImageDataset
from tdc_fast.diffusion import Diffusion, GuidedDenoiser
from tdc_fast.diffusion.timestep_samplers import UniformSampler
from tdc_fast.evaluation import EvaluateOptions, draw_samples
from tdc_fast.evaluation.conditions import draw_labels
from tdc_fast.evaluation.image_sets import load_pair
from tdc_fast.runs.build import build_diffusion, build_unet
from tdc_fast.runs.denoisers import from_checkpoint, from_run, stored_facts
from tdc_fast.runs.loading import load_run
from tdc_fast.serving import Engine
from tdc_fast.train import main, train
from tdc_fast.training.optimization import LearningRate
from tdc_fast.training.stage import Stage
from tdc_fast.training.step import TrainingStep
from tests.training.small_run import TWO_STAGES, differences, small_config

CONDITIONAL = {"class_cond": True, "label_dropout": 0.4}
SHORT = {**TWO_STAGES, "stage1_steps": 4, "stage2_steps": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[tuple[bool, list[int]]]]:
    """A run of two stages, and the labels of every loss in it, with whether a training step asked for it."""
    seen: list[tuple[bool, list[int]]] = []
    inside = [False]
    losses, backward = Diffusion.training_losses, TrainingStep._backward

    def noting(self, model, x0, t, noise=None, model_kwargs=None):
        seen.append((inside[0], model_kwargs["y"].tolist()))
        return losses(self, model, x0, t, noise, model_kwargs)

    def in_a_step(self, *arguments):
        inside[0] = True
        try:
            return backward(self, *arguments)
        finally:
            inside[0] = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "training_losses", noting)
        patch.setattr(TrainingStep, "_backward", in_a_step)
        run = train(small_config(tmp_path_factory.mktemp("label_dropout"), save_interval=3, **CONDITIONAL, **SHORT))
    return run.path, seen


def test_both_stages_drop_labels_and_pruning_measures_with_the_true_ones(trained):
    run, seen = trained
    in_steps = [labels for in_step, labels in seen if in_step]
    assert len(in_steps) == 8 and load_run(run).config.num_classes == 5
    for stage in (in_steps[:4], in_steps[4:]):
        assert {4} < {label for labels in stage for label in labels} <= {0, 1, 2, 3, 4}
    measured = {label for in_step, labels in seen if not in_step for label in labels}
    assert {0} < measured <= {0, 1, 2, 3}  # 0 alone is the sample whose MACs are counted


def test_the_share_of_dropped_labels_is_as_asked_for_and_the_others_stay(tmp_path):
    config = small_config(tmp_path, num_classes=5, microbatch=100, **CONDITIONAL)
    seen: list[torch.Tensor] = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, y):
            seen.append(y)
            return self.scale * x

    stage = Stage(
        name="base", steps=1, batch_size=4000, learning_rate=LearningRate(0.0), macs_per_sample=[1], origin={}
    )
    sampler = UniformSampler(60)
    step = TrainingStep(config, stage, Model(), build_diffusion(config), sampler, None)
    y = torch.arange(4000) % 4
    torch.manual_seed(0)
    rate, number = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    step(torch.zeros(4000, 1, 1, 1), {"y": y}, sampler.prepare(4000), rate, number)
    given = torch.cat(seen)
    dropped = given == 4
    assert len(seen) == 40 and torch.equal(given[~dropped], y[~dropped])
    assert abs(float(dropped.double().mean()) - 0.4) < 4 * (0.24 / 4000) ** 0.5
    assert torch.equal(y, torch.arange(4000) % 4)  # the loader's own labels


def test_a_run_that_is_resumed_drops_the_same_labels(trained, tmp_path):
    run, _ = trained
    again = Path(shutil.copytree(run, tmp_path / "again"))
    for path in (again / "experts").glob("*000004.*"):  # the checkpoint of step 3 is inside an epoch
        path.unlink()
    assert main(["--resume", str(again)]) == 0
    assert differences(run, again) == []


def test_guidance_needs_no_null_class_where_the_run_knows_it(trained, tmp_path, monkeypatch):
    run, _ = trained
    made = []
    build = GuidedDenoiser.__init__
    monkeypatch.setattr(GuidedDenoiser, "__init__", lambda self, *a, **k: made.append(a) or build(self, *a, **k))
    base = next((run / "base").glob("ema_0.9_*.pt"))
    for number, door in enumerate((["--run", str(run)], ["--model_path", str(base)])):
        flags = [*door, "--num_samples", "2", "--steps", "2", "--sampler", "ddim", "--guidance_scale", "2"]
        assert sample.main([*flags, "--out", str(tmp_path / str(number))]) == 0
    assert [arguments[1:3] for arguments in made] == [(2.0, 4), (2.0, 4)]
    assert from_checkpoint(base, stored_facts(model_path=str(base))).null_class == 4


def test_a_scale_for_each_group_is_that_of_the_runs_groups_for_its_base_too(trained, capsys, tmp_path):
    run, _ = trained
    for which in ("experts", "base"):
        denoiser = from_run(run, which)
        drawn = {
            scale: draw_samples(denoiser, 2, steps=6, guidance_scale=scale)[0]
            for scale in ((1.0, 1.0, 1.0), (1000.0, 1.0, 1.0), (1000.0, 1000.0, 1000.0), 1000.0, 1.0)
        }
        assert torch.equal(drawn[1.0, 1.0, 1.0], drawn[1.0])
        assert torch.equal(drawn[1000.0, 1000.0, 1000.0], drawn[1000.0])
        assert not torch.equal(drawn[1000.0, 1.0, 1.0], drawn[1000.0])
    flags = ["--run", str(run), "--num_samples", "1", "--out", str(tmp_path / "out"), "--guidance_scale", "1,2"]
    assert sample.main(flags) == 2
    said = "guidance_scale: got [1.0, 2.0]; expected one number, or 3 of them: one per group from low to high timesteps"
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_evaluate_draws_with_the_guidance_and_the_labels_that_are_asked_for(trained, tmp_path):
    run, _ = trained
    np.save(tmp_path / "real.npy", np.zeros((2, 8, 8, 1), np.uint8))
    options = EvaluateOptions(num_samples=4, steps=6, guidance_scale="1000,1,1", labels="data")
    drawn, _ = load_pair(str(run), str(tmp_path / "real.npy"), options)
    asked = {"steps": 6, "guidance_scale": (1000.0, 1.0, 1.0), "labels": "data"}
    assert torch.equal(drawn.pixels, draw_samples(from_run(run), 4, **asked)[0])
    for name, other in (("guidance_scale", 1.0), ("labels", "uniform")):
        assert not torch.equal(drawn.pixels, draw_samples(from_run(run), 4, **{**asked, name: other})[0])


def test_the_label_for_no_class_is_no_class_to_sample(trained):
    denoiser = from_run(trained[0])
    assert denoiser.classes == (0, 1, 2, 3) and denoiser.num_classes == 5
    with pytest.raises(ValueError, match="classes: got 4; expected classes that the model was trained on: 0 to 3"):
        draw_samples(denoiser, 1, steps=1, classes=(4,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_dropout": 0.1}, "label_dropout: got 0.1; expected --class_cond True as well"),
        ({"label_dropout": 1.0, "class_cond": True}, "label_dropout: got 1.0; expected a share from 0 to below 1"),
        (
            {**CONDITIONAL, "num_classes": 4},
            r"num_classes: got 4; expected at least the 4 classes of .*, and one row for no class \(label_dropout\)",
        ),
    ],
)
def test_what_cannot_be_dropped_is_refused_before_anything_is_written(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        train(small_config(tmp_path, lr_anneal_steps=1, **options))
    assert not (tmp_path / "run").exists()


def test_weights_of_improved_diffusion_have_a_row_to_spare_or_are_refused(tmp_path):
    config = small_config(tmp_path, base=str(tmp_path / "ema.pt"), stop_after="stage1", **CONDITIONAL, **SHORT)
    torch.save(build_unet(config.replace(label_dropout=0.0), 1).state_dict(), tmp_path / "ema.pt")
    run = train(config)
    assert (run.config.num_classes, run.config.null_class) == (1000, 999)
    every = np.arange(1000)
    images = ImageDataset.from_array(np.zeros((1000, 8, 8, 1), np.uint8), every)
    with pytest.raises(ValueError, match=r"1000 classes of the data and one label row for no class \(label_dropout\)"):
        train(config.replace(run_dir=str(tmp_path / "full"), data_dir=""), images)
    assert not (tmp_path / "full").exists()


def test_a_label_for_no_class_that_is_named_is_not_drawn_as_a_class(tmp_path):
    config = small_config(tmp_path, class_cond=True, num_classes=3)
    torch.save(build_unet(config, 1).state_dict(), tmp_path / "model.pt")
    denoiser = from_checkpoint(tmp_path / "model.pt", {**config.to_dict(), "in_channels": 1})
    drawn = [draw_samples(denoiser, 40, steps=1, null_class=null)[1].tolist() for null in (None, 1)]
    assert [set(labels) for labels in drawn] == [{0, 1, 2}, {0, 2}]
    assert Engine.of(denoiser, null_class=1).classes == (0, 2) and Engine.of(denoiser).classes == (0, 1, 2)
    with pytest.raises(ValueError, match="null_class: got 2; expected a label .*; it is their only one"):
        draw_samples(replace(denoiser, classes=(2,)), 1, steps=1, null_class=2)
    with pytest.raises(ValueError, match="labels: got 'data'; expected uniform, as .*model.pt does not record"):
        draw_samples(denoiser, 1, steps=1, labels="data")


def test_labels_are_drawn_as_often_as_the_training_images_have_them(tmp_path):
    labels = np.repeat([1, 3, 4], [2, 6, 12])
    images = ImageDataset.from_array(np.zeros((20, 8, 8, 1), np.uint8), labels)
    run = train(small_config(tmp_path, data_dir="", lr_anneal_steps=1, class_cond=True), images)
    facts = json.loads((run.path / "run.json").read_text())
    assert (facts["classes"], facts["class_counts"]) == ([1, 3, 4], [2, 6, 12])
    weights = next(run.path.glob("ema_0.9_*.pt"))
    doors = (from_run(run.path), from_checkpoint(weights, stored_facts(model_path=str(weights))))
    for denoiser in doors:
        assert denoiser.class_counts == (2, 6, 12)
    drawn = [draw_samples(doors[0], 60, steps=1, labels="data", classes=chosen)[1] for chosen in ((), (4, 1))]
    expected = [draw_labels(*given) for given in (
        ((1, 3, 4), 60, torch.Generator().manual_seed(0), (2, 6, 12)),
        ((4, 1), 60, torch.Generator().manual_seed(0), (12, 2)),
    )]  # fmt: skip
    assert all(map(torch.equal, drawn, expected))
    many = draw_labels((1, 3, 4), 20000, torch.Generator().manual_seed(1), (2, 6, 12)).bincount(minlength=5) / 20000
    torch.testing.assert_close(many, torch.tensor([0.0, 0.1, 0.0, 0.3, 0.6]), rtol=0, atol=0.015)
    del facts["class_counts"]
    (run.path / "run.json").write_text(json.dumps(facts))  # as of a run older than that record
    with pytest.raises(ValueError, match="labels: got 'data'; expected uniform, as .* does not record how many"):
        draw_samples(from_run(run.path), 1, steps=1, labels="data")
