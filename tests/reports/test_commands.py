"""The commands sample, nll and evaluate: where they write, what a kill leaves behind, and what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdc_fast import __main__, evaluate, nll, prune, sample
from tdc_fast import progress as progress_module
from tdc_fast import train as train_command
from tdc_fast.command_line import _help_texts
from tdc_fast.evaluation import samples
from tdc_fast.evaluation.samples import write_samples
from tdc_fast.runs.options import SECTIONS
from tdc_fast.train import train
from tests.training.small_run import small_config

DEAD = 2**22 + 1  # above the largest process id that Linux gives


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a plain run without held-out images, and one with some."""
    folder = tmp_path_factory.mktemp("runs")
    train(small_config(folder, "whole", lr_anneal_steps=2))
    train(small_config(folder, "split", lr_anneal_steps=2, heldout=0.4))
    return folder


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the run without held-out images, to write into."""
    return Path(shutil.copytree(runs / "whole", tmp_path / "run"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_likelihood_measures_the_training_images_of_a_run_without_held_out_ones_and_says_so(run, capsys):
    assert nll.main(["--run", str(run), "--num_samples", "3", "--batch_size", "3"]) == 0
    assert "training images, as it held out none" in capsys.readouterr().out
    assert json.loads((run / "nll" / "nll.json").read_text())["images"] == 3


def test_likelihood_measures_the_held_out_images_where_there_are_some(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--num_samples", "100", "--batch_size", "8"]
    assert nll.main(["--run", str(runs / "split"), *out]) == 0
    assert "held-out images" in capsys.readouterr().out
    assert json.loads((tmp_path / "nll.json").read_text())["images"] == 8  # of 20


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (nll, ["--run", "RUN", "--data_dir", "no/such/folder"]),
        (nll, ["--run", "RUN", "--which", "experts"]),
        (sample, ["--run", "RUN", "--which", "experts"]),
        (sample, ["--run", "RUN", "--device", "cuda:9"]),
        (sample, ["--run", "RUN", "--num_samples", "1", "--classes", "3"]),
        (evaluate, ["RUN", "no/such.npz", "--out", "OUT/e.json"]),
    ],
)
def test_a_command_that_is_refused_leaves_no_empty_folder(run, tmp_path, command, arguments):
    before = files(tmp_path)
    given = [part.replace("RUN", str(run)).replace("OUT", str(tmp_path / "new")) for part in arguments]
    assert command.main(given) == 2
    assert files(tmp_path) == before


def test_outputs_that_cannot_be_written_are_refused_before_the_work(run, tmp_path, capsys):
    for command, arguments in (
        (nll, ["--run", str(run), "--out", str(run / "config.json" / "deeper")]),
        (sample, ["--run", str(run), "--out", str(run / "config.json")]),
        (evaluate, [str(run), "digits", "--out", str(run / "config.json" / "e.json")]),
    ):
        assert command.main(arguments) == 2
        said = capsys.readouterr()
        assert "config.json is a file" in said.err and "drawing" not in said.out


@pytest.mark.parametrize("command", [sample, nll])
def test_a_command_without_a_model_says_so_in_a_sentence(command, capsys):
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no model is named; give either --run DIR or --model_path FILE")


@pytest.mark.parametrize("command", [train_command, prune])
def test_training_without_any_argument_names_what_is_missing(command, capsys):
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith(("error: data_dir: got ''", "error: base: got ''"))


@pytest.mark.parametrize("command", [sample, nll])
def test_a_run_and_a_file_of_weights_are_refused_together(run, command, capsys):
    assert command.main(["--run", str(run), "--model_path", "model.pt"]) == 2
    assert "model_path: got 'model.pt'; expected none together with --run" in capsys.readouterr().err


def test_evaluate_without_names_says_so_in_a_sentence(capsys):
    assert evaluate.main([]) == 2
    assert capsys.readouterr().err.startswith("error: 0 sets of images are named; name two of")


def test_evaluate_writes_into_the_run_and_says_how_to_draw_fewer(run, capsys, monkeypatch):
    data = str(run.parent / "same.npz")
    np.savez(data, np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8))
    more = [
        "--num_samples",
        "4",
        "--steps",
        "2",
        "--batch_size",
        "2",
        "--loss_images",
        "2",
        "--features",
        "random-conv",
    ]
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    for names in ([str(run), data], [data, str(run)]):
        (run / "evaluation.json").unlink(missing_ok=True)
        assert evaluate.main([*names, *more]) == 0
        assert json.loads((run / "evaluation.json").read_text())["version"] == 1
    said = capsys.readouterr().out
    assert "--num_samples draws fewer" in said
    assert "drawing 4 images: 50%" in said and " left\n" in said and "drawing 4 images: 100%\n" in said


def test_evaluate_of_two_sets_writes_into_the_working_directory(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["a.npz", "a.npz"]) == 0
    assert (tmp_path / "evaluation.json").is_file()


def test_samples_that_a_kill_left_without_picture_are_completed_and_cleaned_by_the_next_run(run):
    folder = run / "samples"
    options = ["--run", str(run), "--steps", "2", "--sampler", "ddim", "--num_samples"]
    assert sample.main([*options, "3"]) == 0
    with Image.open(folder / "samples_3x8x8x1.png") as picture:
        whole = np.asarray(picture).copy()
    (folder / "samples_3x8x8x1.png").unlink()
    for half in (f".samples_9x8x8x1.npz.{DEAD}.tmp", f".samples_9x8x8x1.png.{DEAD}.tmp"):
        (folder / half).write_bytes(b"half")
    (folder / f".samples_7x8x8x1.npz.{os.getppid()}.tmp").write_bytes(b"of another process, which still runs")
    np.savez(folder / "samples_of_another_program.npz", np.zeros(3))
    assert sample.main([*options, "2"]) == 0
    assert files(folder) == {f"samples_{count}x8x8x1.{kind}" for count in (2, 3) for kind in ("npz", "png")} | {
        f".samples_7x8x8x1.npz.{os.getppid()}.tmp",
        "samples_of_another_program.npz",
    }
    with Image.open(folder / "samples_3x8x8x1.png") as picture:
        assert np.array_equal(np.asarray(picture), whole)


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_picture_never_shows_other_images_than_its_archive(tmp_path, monkeypatch, stopped_at):
    first, second = (torch.full((2, 1, 8, 8), value, dtype=torch.uint8) for value in (10, 200))
    write_samples(tmp_path, first, None)
    count, real = 0, samples.atomic_file

    def killed(path):
        nonlocal count
        count += 1
        if count == stopped_at:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(samples, "atomic_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, second, None)
    monkeypatch.undo()
    samples.complete_samples(tmp_path)
    pixels = np.load(tmp_path / "samples_2x8x8x1.npz")["arr_0"]
    with Image.open(tmp_path / "samples_2x8x8x1.png") as picture:
        assert pixels[0, 0, 0, 0] in np.unique(np.asarray(picture))


def test_likelihood_files_of_two_measurements_never_pass_for_one(run, tmp_path, monkeypatch):
    arguments = ["--run", str(run), "--num_samples", "2", "--batch_size", "2", "--out", str(tmp_path / "nll")]
    assert nll.main(arguments) == 0
    monkeypatch.setattr("tdc_fast.evaluation.likelihood.np.savez", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert nll.main(arguments) == 130
    assert not (tmp_path / "nll" / "nll.json").exists()


def test_the_package_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tdc_fast"])
    assert __main__.main() == 0
    said = capsys.readouterr().out
    for command in ("train", "prune", "sample", "serve", "nll", "evaluate", "latency", "demo"):
        assert f"python -m tdc_fast.{command} " in said
    for wrong, remedy in (("train", "python -m tdc_fast.train, with a dot"), ("fly", "'fly' is no command")):
        monkeypatch.setattr(sys, "argv", ["tdc_fast", wrong])
        assert __main__.main() == 2
        assert remedy in capsys.readouterr().err


def test_listing_the_commands_loads_no_command():
    code = "import runpy, sys; runpy.run_module('tdc_fast', run_name='__main__')"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "tdc_fast.train" in done.stdout and "tdc_fast.runs" not in done.stderr


def test_help_has_a_short_and_a_full_form_and_no_line_wraps_twice(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = {}
    for form in ("-h", "--help"):
        with pytest.raises(SystemExit, match="0"):
            train_command.main([form])
        said[form] = capsys.readouterr().out
    assert len(said["-h"].splitlines()) * 2 < len(said["--help"].splitlines())
    assert "--data_dir" in said["-h"] and "--help explains all" in said["-h"] and "--llm_timeout" not in said["-h"]
    assert "--llm_timeout" in said["--help"]
    # tyro would keep the line breaks of the source, and wrap each of those lines once more
    assert not any("\n" in text for section in SECTIONS.values() for text in _help_texts(section).values())
