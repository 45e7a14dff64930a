"""The command lines sample, evaluate and nll: the files they write and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tdc_fast import evaluate, nll, sample
from tdc_fast.evaluation import comparison, draw_samples, heldout_losses, train_classifier
from tdc_fast.evaluation.image_sets import load_pair
from tdc_fast.evaluation.likelihood import bits_per_dimension, images_to_measure
from tdc_fast.models.iddpm import create_unet
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.denoisers import from_checkpoint, from_run, placed, split_of, stored_facts
from tdc_fast.runs.precision import named_dtype
from tdc_fast.train import TrainConfig, train
from tests.models.test_iddpm import randomise

MODEL = [
    *(["--image_size", "8", "--num_channels", "8", "--num_res_blocks", "1", "--channel_mult", "1,2"]),
    *(["--attention_resolutions", "4", "--num_heads", "1", "--diffusion_steps", "100"]),
]


@pytest.fixture
def assert_refused(capsys) -> Callable[[str, ModuleType, list[str]], None]:
    """Asserts that a command refuses its arguments: exit status 2 and one error on stderr that matches a pattern."""

    def assert_refused(pattern: str, command: ModuleType, arguments: list[str]) -> None:
        assert command.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        assert re.search(pattern, said)

    return assert_refused


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A class-conditional run of two experts, trained for two steps."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        data_dir="digits", image_size=8, num_channels=8, channel_mult="1,2", num_res_blocks=1, num_heads=1,
        attention_resolutions="", diffusion_steps=20, noise_schedule="cosine", batch_size=8, heldout=0.2, groups=2,
        class_cond=True, num_classes=10, k=1.0, stage1_steps=2, stage2_steps=2, tensorboard=False, progress="never",
        run_dir=str(directory),
    )  # fmt: skip
    train(config)
    return directory


@pytest.fixture(scope="module")
def foreign_weights(tmp_path_factory) -> Path:
    """A state dict as improved-diffusion saves it: RGB, with no description beside it."""
    path = tmp_path_factory.mktemp("foreign") / "ema_0.9999_000010.pt"
    torch.manual_seed(0)
    model = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4", num_heads=1
    )
    torch.save(model.state_dict(), path)
    return path


def test_sampling_a_run_writes_the_grid_and_the_archive_with_labels(run, tmp_path, capsys):
    sample.main(["--run", str(run), "--num_samples", "5", "--batch-size=3", "--use_ddim", "true", "--steps", "4",
                 "--out", str(tmp_path), "--classes", "3,7"])  # fmt: skip
    archive = np.load(tmp_path / "samples_5x8x8x1.npz")
    assert archive["arr_0"].shape == (5, 8, 8, 1) and archive["arr_0"].dtype == np.uint8
    assert archive["arr_1"].shape == (5,) and set(archive["arr_1"]) <= {3, 7}
    with Image.open(tmp_path / "samples_5x8x8x1.png") as picture:
        assert picture.width > 5 * 8
    assert "samples_5x8x8x1.npz" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_images_and_another_one_others(run, tmp_path):
    images = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        sample.main(["--run", str(run), "--num_samples", "4", "--sampler", "ddim", "--steps", "3", "--seed", seed,
                     "--out", str(tmp_path / name)])  # fmt: skip
        images.append(np.load(tmp_path / name / "samples_4x8x8x1.npz")["arr_0"])
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_a_command_line_of_image_sample_runs_on_foreign_weights(foreign_weights, tmp_path, capsys):
    sample.main([*MODEL, "--model_path", str(foreign_weights), "--num_samples", "3", "--batch_size", "2",
                 "--clip_denoised", "True", "--use_ddim", "True", "--timestep_respacing", "ddim5",
                 "--out", str(tmp_path)])  # fmt: skip
    archive = np.load(tmp_path / "samples_3x8x8x3.npz")
    assert archive["arr_0"].shape == (3, 8, 8, 3)
    assert "arr_1" not in archive.files
    assert (
        "without an error: --diffusion_steps 100 --noise_schedule linear" in capsys.readouterr().err
    )  # flags that may be wrong


def test_weights_that_do_not_fit_the_flags_are_refused_with_the_flags_that_would(
    foreign_weights, tmp_path, assert_refused
):
    flags = [*MODEL, "--num_channels", "16"]
    assert_refused("--num_channels 8", sample, [*flags, "--model_path", str(foreign_weights), "--out", str(tmp_path)])


def test_an_optimizers_file_is_refused_under_the_name_of_the_flag(run, tmp_path, assert_refused):
    optimizer = next((run / "base").glob("opt*.pt"))
    assert_refused("model_path: .*state dict", sample, ["--model_path", str(optimizer), "--out", str(tmp_path)])


def test_a_flag_that_contradicts_the_run_is_refused_by_name(run, tmp_path, assert_refused):
    assert_refused(
        "num_channels: got 16; expected 8", sample, ["--run", str(run), "--num_channels", "16", "--out", str(tmp_path)]
    )
    base = next((run / "base").glob("ema_*.pt"))
    assert_refused(
        "noise_schedule: got 'linear'",
        sample,
        ["--model_path", str(base), "--noise_schedule", "linear", "--out", str(tmp_path)],
    )


def test_a_checkpoint_of_ours_needs_no_flags_and_experts_are_sampled_by_run(run, tmp_path, assert_refused):
    base, experts = (next((run / stage).glob("ema_*.pt")) for stage in ("base", "experts"))
    sample.main(["--model_path", str(base), "--num_samples", "2", "--timestep_respacing", "3", "--out", str(tmp_path)])
    assert (tmp_path / "samples_2x8x8x1.npz").is_file()
    assert_refused("--run", sample, ["--model_path", str(experts), "--out", str(tmp_path)])


def test_a_run_alone_gives_a_hundred_images_in_few_steps(run, tmp_path):
    sample.main(["--run", str(run), "--out", str(tmp_path)])
    assert np.load(tmp_path / "samples_100x8x8x1.npz")["arr_0"].shape == (100, 8, 8, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --run DIR or --model_path FILE"),
        (["--run", "nowhere"], "run: got 'nowhere'"),
        (["--model_path", "nowhere.pt"], "nowhere.pt"),
        (["--run", "RUN", "--num_samples", "-1"], "num_samples: got -1"),
        (["--run", "RUN", "--classes", "10", "--num_samples", "1"], "classes: got 10"),
        (["--run", "RUN", "--use_ddim", "maybe"], "use_ddim: got 'maybe'"),
        (["--run", "RUN", "--device", "toaster"], "device: got 'toaster'"),
        (["--run", "RUN", "--device", "cuda:9"], "device: got 'cuda:9'"),
        (["--run", "RUN", "--num_threads", "-2"], "num_threads: got -2"),
        (["--run", "RUN", "--out", "RUN/config.json"], "config.json"),
    ],
)
def test_sample_refuses_what_it_cannot_do(run, flags, message, tmp_path, assert_refused):
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    assert_refused(message, sample, ["--out", str(tmp_path), *flags])


def test_experts_are_sampled_and_measured_on_respaced_timesteps(run, tmp_path):
    few = ["--run", str(run), "--num_samples", "2", "--timestep_respacing", "5", "--out", str(tmp_path)]
    sample.main(few)
    assert (tmp_path / "samples_2x8x8x1.npz").is_file()
    nll.main(few)
    assert np.load(tmp_path / "vb_terms.npz")["arr_0"].shape == (5,)


@pytest.mark.parametrize("name", ["groups.json", "config.json", "run.json"])
def test_a_run_that_lacks_a_file_is_refused_by_the_name_of_the_file(run, name, tmp_path, assert_refused):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    assert_refused(name, sample, ["--run", str(tmp_path / "run")])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A folder of grey images as png, and the same images as npz."""
    directory = tmp_path_factory.mktemp("sets")
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12), dtype=np.uint8)
    (directory / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(directory / "folder" / f"{number:02d}.png")
    np.savez(directory / "same.npz", images[..., None])
    np.savez(directory / "rgb.npz", np.random.default_rng(1).integers(0, 256, (25, 12, 12, 3), dtype=np.uint8))
    return directory


def test_a_folder_and_an_archive_of_the_same_images_have_no_distance(sets, tmp_path, capsys):
    out = tmp_path / "numbers" / "e.json"
    evaluate.main([str(sets / "folder"), str(sets / "same.npz"), "--out", str(out)])
    numbers = json.loads(out.read_text())
    assert numbers["frechet_distance"] == pytest.approx(0.0, abs=1e-3)
    assert "random convolutional" in numbers["feature_space"]
    assert numbers["few_images"]
    shown = capsys.readouterr().out
    assert "Fréchet distance" in shown and "halves of 15" in shown
    assert "FID" not in shown + out.read_text()


def test_image_size_brings_sets_of_different_sizes_together(sets, tmp_path):
    np.savez(tmp_path / "wide.npz", np.zeros((5, 9, 17, 3), np.uint8))
    for name in ("digits", str(tmp_path / "wide.npz")):
        with pytest.raises(ValueError, match="image_size"):
            load_pair(str(sets / "rgb.npz"), name, evaluate.EvaluateOptions())
        pair = load_pair(str(sets / "rgb.npz"), name, evaluate.EvaluateOptions(image_size=6))
        assert [tuple(one.shape) for one in pair] == [(3, 6, 6), (3, 6, 6)]


def test_folders_of_images_of_several_sizes_are_scaled_only_where_a_size_is_named(sets, tmp_path):
    for number, size in enumerate([(12, 20), (20, 12), (16, 16)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    for names in [(sets / "folder", tmp_path), (tmp_path, tmp_path)]:
        with pytest.raises(ValueError, match="image_size: got 0; expected .* has 12 pixels, and .*2.png 16"):
            load_pair(*map(str, names), evaluate.EvaluateOptions())
    assert load_pair(str(sets / "same.npz"), str(tmp_path), evaluate.EvaluateOptions())[1].shape[1:] == (12, 12)
    (tmp_path / "2.png").unlink()
    assert load_pair(str(sets / "folder"), str(tmp_path), evaluate.EvaluateOptions())[1].shape[1:] == (12, 12)


def test_different_images_have_a_distance_above_zero(sets, tmp_path):
    result = evaluate.evaluate(str(sets / "rgb.npz"), str(sets / "folder"), evaluate.EvaluateOptions())
    assert result["frechet_distance"] > 0.01
    assert (result["a"]["images"], result["b"]["images"]) == (25, 30)


def test_a_run_is_sampled_and_its_held_out_loss_measured(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "train_classifier", lambda: train_classifier(epochs=2))
    out = tmp_path / "e.json"
    evaluate.main([str(run), "digits", "--num_samples=20", "--steps", "2", "--loss_images", "16",
                   "--dtype", "bfloat16", "--out", str(out)])  # fmt: skip
    numbers = json.loads(out.read_text())
    assert numbers["a"] == {"name": str(run), "images": 20, "is_run": True, "dtype": "bfloat16"}
    losses = numbers["losses"][str(run)]
    assert len(losses["per_group"]) == 2 and losses["num_images"] == 16
    assert "held-out" in losses["images"]
    assert numbers["floors_of"] == "digits"
    assert "denoising loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["digits"], "two of"),
        (["digits", "no/such.npz"], "no/such.npz"),
        (["SETS/same.npz", "digits"], r"\(1, 8, 8\)"),
        (["SETS/rgb.npz", "SETS/rgb.npz", "--features", "digits"], "random-conv"),
        (["SETS/rgb.npz", "SETS/rgb.npz", "--batch_size", "0"], "batch_size: got 0"),
        (["SETS/rgb.npz", "SETS/rgb.npz", "--device", "toaster"], "device: got 'toaster'"),
        (["SETS/rgb.npz", "SETS/rgb.npz", "--num_threads", "-1"], "num_threads: got -1"),
        (["SETS/rgb.npz", "SETS/rgb.npz", "--out", "SETS/folder"], "out: got .*folder'; expected the name of a file"),
    ],
)
def test_evaluate_refuses_what_does_not_compare(sets, names, message, tmp_path, assert_refused):
    names = [name.replace("SETS", str(sets)) for name in names]
    assert_refused(message, evaluate, ["--out", str(tmp_path / "e.json"), *names])
    assert not (tmp_path / "e.json").exists()


def test_likelihood_terms_are_written_from_the_last_timestep_down_and_add_up(run, tmp_path):
    nll.main(["--run", str(run), "--num_samples", "6", "--batch_size", "4", "--out", str(tmp_path)])
    terms = {name: np.load(tmp_path / f"{name}_terms.npz")["arr_0"] for name in ("vb", "mse", "xstart_mse")}
    numbers = json.loads((tmp_path / "nll.json").read_text())
    assert all(values.shape == (20,) for values in terms.values())
    assert numbers["images"] == 6
    assert numbers["bits_per_dimension"] == pytest.approx(terms["vb"].sum() + numbers["prior"], rel=1e-5)
    assert terms["xstart_mse"][0] > terms["xstart_mse"][-1]  # x0 is hardest to see where there is most noise


@pytest.mark.parametrize("which", ["base", "experts"])
def test_in_bf16_samples_losses_and_likelihood_are_those_of_fp32_but_for_its_rounding(run, which, capsys):
    found = {}
    for dtype in ("float32", "bfloat16"):
        denoiser = from_run(run, which)
        randomise(denoiser.model)  # after two steps of training its output would be next to zero
        denoiser = placed(denoiser, torch.device("cpu"), dtype)
        assert denoiser.dtype == dtype and denoiser.diffusion.num_timesteps == 20
        images, labels = draw_samples(denoiser, 6, steps=5, seed=1)
        x0 = images.float() / 127.5 - 1
        groups, condition = TimestepGroups.uniform(20, 2), {"y": labels}
        loss = heldout_losses(
            denoiser.model, denoiser.diffusion, x0, groups, model_kwargs=condition, points_per_group=2
        )
        bits = bits_per_dimension(denoiser, x0, labels, batch_size=6)["total"]
        found[dtype] = images.float(), float(loss.mean), float(bits)
    assert capsys.readouterr().out.count(f"model:   {run} ({which}) in bfloat16\n") == 1
    difference = (found["float32"][0] - found["bfloat16"][0]).abs() / 127.5
    assert 0 < difference.max() <= 5 * torch.finfo(torch.bfloat16).eps * 2  # in five steps
    for ours, plain in zip(found["bfloat16"][1:], found["float32"][1:], strict=True):
        assert ours != plain and ours == pytest.approx(plain, rel=0.005)


def test_a_likelihood_in_bf16_says_so_in_its_file(run, tmp_path):
    few = ["--num_samples", "2", "--batch_size", "2", "--timestep_respacing", "3", "--out", str(tmp_path)]
    for dtype, recorded in (("bfloat16", "bfloat16"), ("auto", "float32")):
        assert nll.main(["--run", str(run), "--dtype", dtype, *few]) == 0
        assert json.loads((tmp_path / "nll.json").read_text())["dtype"] == recorded


@pytest.mark.parametrize("command", [sample, nll, evaluate])
def test_a_precision_that_the_cpu_does_not_have_is_refused_before_anything_is_done(
    run, command, tmp_path, assert_refused, monkeypatch
):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a model ran"))
    names = [str(run), "digits"] if command is evaluate else ["--run", str(run)]
    flags = [*names, "--dtype", "float16", "--out", str(tmp_path / "out")]
    assert_refused("dtype: got 'float16'; expected float32 or bfloat16 on the CPU", command, flags)
    assert not (tmp_path / "out").exists()


def test_a_file_of_weights_knows_the_precision_that_it_was_trained_in(run, tmp_path):
    base = next((run / "base").glob("ema_*.pt"))
    assert from_checkpoint(base, {**stored_facts(model_path=str(base)), "in_channels": 1}).config.precision == "fp32"
    for path in (base, base.with_suffix(".json")):
        shutil.copy(path, tmp_path)
    record = tmp_path / base.with_suffix(".json").name
    described = json.loads(record.read_text())
    described["config"]["use_fp16"] = True  # improved-diffusion's switch
    record.write_text(json.dumps(described))
    copied = tmp_path / base.name
    denoiser = from_checkpoint(copied, stored_facts(model_path=str(copied)))
    assert denoiser.config.mixed_precision
    gpu = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert named_dtype("auto", gpu, True) == torch.bfloat16 and named_dtype("auto", gpu, False) == torch.float32
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "a T4")
        assert named_dtype("auto", gpu, True) == torch.float32 and named_dtype("float16", gpu, True) == torch.float16
        with pytest.raises(ValueError, match="^dtype: got 'bfloat16'; expected float32 or float16, as a T4 has no"):
            named_dtype("bfloat16", gpu, True)


def test_likelihood_reads_a_folder_as_training_does_and_refuses_one_of_other_classes(run, tmp_path):
    for name in ("0_a", "1_a", "1_b"):
        Image.new("RGBA", (8, 8)).save(tmp_path / f"{name}.png")  # nothing but background
    for which, config in enumerate([{"background": "black"}, {"background": "white"}]):
        denoiser = from_run(run)
        denoiser = replace(denoiser, config=denoiser.config.replace(**config))
        with pytest.raises(ValueError, match="data_dir: .* all 10 classes .*it has 2"):
            images_to_measure(denoiser, str(tmp_path), 3)
        x0, labels, _ = images_to_measure(replace(denoiser, class_counts=()), str(tmp_path), 3)
        assert x0.shape == (3, 1, 8, 8) and labels.tolist() == [0, 1, 1]
        assert x0.unique().tolist() == [2 * which - 1]


def test_images_that_changed_since_training_have_no_held_out_ones(run):
    denoiser = from_run(run)
    assert len(split_of(denoiser)[1]) == 359
    changed = replace(denoiser, config=denoiser.config.replace(heldout_seed=1))  # as when the folder has other images
    with pytest.raises(ValueError, match="data_dir: got 'digits'; expected the images as .* was trained on them"):
        split_of(changed)
    images = comparison.ImageSet("images", torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert "data_dir" in comparison._losses(changed, images, evaluate.EvaluateOptions())["skipped"]


def test_likelihood_refuses_a_device_that_is_not_there(run, tmp_path, assert_refused):
    assert_refused("device: got 'cuda:9'", nll, ["--run", str(run), "--device", "cuda:9", "--out", str(tmp_path / "o")])


def test_an_eta_that_the_sampler_would_ignore_is_refused(run, assert_refused):
    flags = ["--run", str(run), "--sampler", "dpm++2m", "--steps", "3", "--eta", "0.5"]
    assert_refused(r"eta: got 0.5; expected 0 with the sampler dpm\+\+2m", sample, flags)


def test_guidance_moves_the_images_and_a_scale_of_one_changes_nothing(run, tmp_path):
    flags = ["--run", str(run), "--num_samples", "3", "--sampler", "ddim", "--steps", "3", "--eta", "0.5"]
    images = []
    for scale in ("1", "1000"):  # of two steps of training little is to be seen otherwise
        guided = ["--guidance_scale", scale, "--null_class", "0", "--classes", "3", "--out", str(tmp_path / scale)]
        assert sample.main([*flags, *guided]) == 0
        images.append(np.load(tmp_path / scale / "samples_3x8x8x1.npz")["arr_0"])
    assert sample.main([*flags, "--classes", "3", "--out", str(tmp_path / "plain")]) == 0
    plain = np.load(tmp_path / "plain" / "samples_3x8x8x1.npz")["arr_0"]
    assert np.array_equal(images[0], plain) and not np.array_equal(images[1], plain)


@pytest.mark.parametrize(("flags", "said"), [
    (["--guidance_scale", "2"], "guidance_scale: got 2.0; expected 1, or --null_class"),
    (["--guidance_scale", "2", "--null_class", "10"], "null_class: got 10; expected a label of the model from 0 to 9"),
    (["--guidance_scale", "1001"], "guidance_scale: got 1001"),
    (["--guidance_scale", "a"], "guidance_scale: got 'a'; expected a comma list of float values"),
    (["--guidance_scale", ""], "guidance_scale: got ''; expected a number, or a comma list"),
    (["--labels", "often"], "labels"),
])  # fmt: skip
def test_guidance_that_the_model_cannot_give_is_refused(run, flags, said, tmp_path, assert_refused):
    assert_refused(said, sample, ["--run", str(run), "--out", str(tmp_path), *flags])


def test_deterministic_images_of_a_single_denoiser_do_not_depend_on_the_batch(run):
    denoiser = from_run(str(run), "base").batch_invariant()
    alone, _ = draw_samples(denoiser, 1, sampler="ddpm", steps=3, seed=5)
    x = torch.randn(7, *denoiser.image_shape)
    t, y = torch.arange(7), torch.arange(7)
    with torch.no_grad():
        together = denoiser.model(x, t, y=y)
        assert all(torch.equal(denoiser.model(x[i : i + 1], t[i : i + 1], y=y[i : i + 1])[0], together[i]) for i in t)
    assert denoiser.batch_invariant() is denoiser and alone.shape == (1, 1, 8, 8)
