"""Runs that go on: changed settings, refusals that write nothing, kills, labels, launchers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_fast import evaluation, prune, sample
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.runs import lock
from tdc_fast.runs.denoisers import from_run
from tdc_fast.runs.weights import load_tensors
from tdc_fast.train import main, train
from tdc_fast.training import load_run, pruning
from tdc_fast.training import preview as previews
from tdc_fast.training.pruning import prune_base_file, prune_run
from tests.training.small_run import TWO_STAGES, differences, flags, rows, small_config

SHORT = {**TWO_STAGES, "stage1_steps": 4, "stage2_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def two_stages(folder):
    return train(small_config(folder, "two_stages", preview=1, **SHORT)).path


@pytest.fixture
def run(two_stages, tmp_path) -> Path:
    return Path(shutil.copytree(two_stages, tmp_path / "run"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- changed settings


def test_a_diverged_run_goes_on_from_its_last_finite_checkpoint_with_a_lower_rate(folder, capsys, monkeypatch):
    from tdc_fast.training.loop import StageLoop

    step = StageLoop._train_step

    def breaking_step(self):
        step(self)
        if self.step == 7 and self.run.config.lr > 1e-4:
            next(self.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(StageLoop, "_train_step", breaking_step)
    config = small_config(folder, "diverging", lr_anneal_steps=12, log_interval=20)
    path = Path(config.run_dir)
    assert main(flags(config)) == 2
    said = capsys.readouterr().err
    assert "model000008.pt would hold infinities or NaN, in " in said
    assert "the last finite checkpoint is step 4" in said
    assert f"--resume {path} --override lr=0.0001,grad_clip=1" in said
    assert not (path / "model000008.pt").exists()
    assert main(["--resume", str(path), "--override", "lr=0.0001,grad_clip=1"]) == 0
    record = json.loads((path / "run.json").read_text())["overrides"]
    assert [(entry["step"], entry["changes"]) for entry in record] == [(4, {"lr": 1e-4, "grad_clip": 1.0})]
    assert record[0]["before"] == {"lr": 1e-3, "grad_clip": 0.0}
    assert [row["lr"] for row in rows(path / "progress.csv")][-1] == str(1e-4 * (1 - 11 / 12))
    assert load_run(path).config.lr == 1e-4
    assert json.loads((path / "model000012.json").read_text())["config"]["lr"] == 1e-4


def test_a_run_goes_on_with_images_that_moved_and_with_no_others(tmp_path, capsys):
    config = small_config(tmp_path, "moved", lr_anneal_steps=2, class_cond=True)
    path, images, moved = Path(config.run_dir), tmp_path / "images.npz", tmp_path / "elsewhere.npz"
    assert main(flags(config)) == 0
    shutil.copy(images, moved)
    assert main(["--resume", str(path), "--data_dir", str(moved)]) == 2
    assert f"as the resumed run has it; --override data_dir={moved} changes it" in capsys.readouterr().err
    images.unlink()
    assert main(["--resume", str(path), "--override", f"data_dir={moved},lr_anneal_steps=3"]) == 0
    assert main(["--resume", str(path), "--override", "lr_anneal_steps=4"]) == 0  # it knows the place now
    assert load_run(path).config.data_dir == str(moved) and load_run(path).steps("base")[-1] == 4
    capsys.readouterr()
    pixels = np.load(moved)["arr_0"]
    np.savez(tmp_path / "others.npz", arr_0=pixels, arr_1=np.zeros(len(pixels), int))
    assert main(["--resume", str(path), "--override", f"data_dir={tmp_path / 'others.npz'}"]) == 2
    assert "expected the images that the run began with; these have other classes" in capsys.readouterr().err


def test_an_override_holds_for_the_rest_of_the_run_and_leaves_the_rest_alone(folder, capsys):
    config = small_config(folder, "overridden", lr_anneal_steps=4)
    path = Path(config.run_dir)
    assert main(flags(config)) == 0
    change = ["--resume", str(path), "--override"]
    assert main([*change, "batch_size=3,lr_anneal_steps=8,stage2_anneal=False"]) == 0
    assert main([*change, "lr_anneal_steps=9"]) == 0
    assert load_run(path).steps("base")[-1] == 9
    assert json.loads((path / "macs.json").read_text())["phases"]["stage1"]["samples"] == 4 * 6 + 5 * 3
    assert len(json.loads((path / "run.json").read_text())["overrides"]) == 2
    assert main(["--resume", str(path), "--override", "batch_size=3"]) == 0  # as it is already
    assert len(json.loads((path / "run.json").read_text())["overrides"]) == 2
    before = contents(path)
    for value, said in [
        ("seed=3", "override: got 'seed=3'"),
        ("lr", "name=value"),
        ("lr=fast", "lr: got 'fast'"),
        ("lr=-1", "lr: got -1"),
        ("num_channels=16", "override: got 'num_channels=16'"),
        ("lr=1,lr=2", "expected lr once"),
        ("lr_anneal_steps=8", "override: got 'lr_anneal_steps=8'; expected at least 9"),
        ("stage1_steps=8", "override: got 'stage1_steps=8'; expected at least 9"),
    ]:
        assert main([*change, value]) == 2
        assert said in capsys.readouterr().err
    assert main([*flags(config), "--override", "lr=1"]) == 2
    assert "--resume RUN as well" in capsys.readouterr().err
    assert contents(path) == before


def test_what_is_over_or_computed_is_not_overridden(run, folder, capsys):
    before = contents(run)
    assert main(["--resume", str(run), "--override", "stage1_steps=9"]) == 2
    assert "options of stage 2 alone" in capsys.readouterr().err
    assert main(["--resume", str(run), "--override", "stage2_steps=3"]) == 2
    assert "override: got 'stage2_steps=3'; expected at least 4" in capsys.readouterr().err
    assert contents(run) == before
    budgeted = small_config(folder, "budgeted", groups=2, k=1.0, baseline_steps=20, stop_after="stage1")
    train(budgeted)
    assert main(["--resume", budgeted.run_dir, "--override", "batch_size=2"]) == 2
    assert "--microbatch, or a new run" in capsys.readouterr().err


def test_experts_go_on_with_changed_settings(run):
    for path in (run / "experts").glob("*000004.*"):
        path.unlink()
    assert main(["--resume", str(run), "--override", "lr=0.002,stage2_batch=3,stage2_steps=6"]) == 0
    assert load_run(run).steps("experts")[-1] == 6
    assert sample.main(["--run", str(run), "--num_samples", "1"]) == 0


# --- a refusal writes nothing


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("widths.json", b"{"),
        ("widths.json", b"[]"),
        ("groups.json", b"{"),
        ("macs.json", b"{}"),
        ("macs.json", b"["),
        ("run.json", b"{"),
        ("run.json", b"[]"),
        ("config.json", b"{"),
        ("experts/state000004.json", b"{}"),
        ("experts/model000004.json", b"{}"),
        ("experts/opt000004.json", b"["),
        ("base/ema_0.9_000004.json", b"null"),
        ("experts/ema_0.9_000004.pt", b""),
        ("experts/opt000004.pt", b""),
        ("base/model000004.pt", b""),
    ],
)
def test_a_refused_resume_writes_nothing(run, capsys, name, damage):
    (run / name).write_bytes(damage)
    before = contents(run)
    assert main(["--resume", str(run), "--override", "lr=0.5", "--preview", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and Path(name).name in said and "config: got" not in said
    assert contents(run) == before
    if name in ("run.json", "config.json"):
        for command in (sample.main, prune.main):
            assert command(["--run", str(run)]) == 2
            assert capsys.readouterr().err.startswith(f"error: {name}: got '{run / name}'; expected the file as it was")


def test_a_resumed_run_keeps_what_is_known_of_its_experts_cost(run):
    before = contents(run)
    assert main(["--resume", str(run)]) == 0
    after = contents(run)
    assert after["macs.json"] == before["macs.json"]
    assert json.loads(after["macs.json"])["per_sample"]["forward"]["experts"]


# --- processes


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_launcher_of_several_processes_is_refused_by_name(folder, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "2")
    config = small_config(folder, f"launched{name}", lr_anneal_steps=1)
    assert main(flags(config)) == 2
    assert f"error: {name}: got '2'; expected 1" in capsys.readouterr().err
    for work in (
        lambda: train(config),
        lambda: prune_run(config.run_dir),
        lambda: prune_base_file(config),
        lambda: evaluation.evaluate(config.run_dir, "digits"),
        lambda: evaluation.draw_samples(None, 1),
        lambda: evaluation.bits_per_dimension(None, None, None, batch_size=1),
        lambda: evaluation.heldout_losses(None, None, None, None),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got '2'; expected 1[:,] "):
            work()
    for command in (sample.main, prune.main):
        assert command(["--run", config.run_dir]) == 2
        assert name in capsys.readouterr().err
    assert not Path(config.run_dir).exists()
    monkeypatch.setenv(name, "1")
    assert main(flags(config)) == 0


def test_every_command_imports_without_fcntl():
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import tdc_fast.train, tdc_fast.sample, tdc_fast.evaluate, tdc_fast.prune, tdc_fast.nll, tdc_fast.demo\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_without_fcntl_a_lock_file_is_locked_where_windows_can(tmp_path, monkeypatch):
    held: set[int] = set()

    class Windows:
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor, mode, count):
            inode = os.fstat(descriptor).st_ino
            if inode in held:
                raise PermissionError(13, "Permission denied")
            held.add(inode)

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", Windows, raising=False)
    with lock.sole_writer(tmp_path), pytest.raises(ValueError, match="run_dir: got"), lock.sole_writer(tmp_path):
        pass
    monkeypatch.setattr(lock, "msvcrt", None)
    with lock.sole_writer(tmp_path):
        pass


def test_termination_during_pruning_ends_as_ctrl_c_does(folder, tmp_path):
    config = small_config(folder, "terminated", **{**SHORT, "stop_after": "stage1"})
    train(config)
    code = (
        "import sys, time\n"
        "import tdc_fast.training.pruning as pruning\n"
        "def search(*arguments):\n    print('searching', flush=True)\n    time.sleep(60)\n"
        "pruning._search = search\n"
        "from tdc_fast.{} import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for command, flag, said in (("train", "--resume", "--resume"), ("prune", "--run", "continues from memory.jsonl")):
        process = subprocess.Popen(
            [sys.executable, "-c", code.format(command), flag, config.run_dir],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if "searching" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=30)[1]
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert said in errors and "stopped" in errors


# --- labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A class-conditional run whose images have the classes 1 and 3."""
    folder = tmp_path_factory.mktemp("labelled")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images, arr_1=np.arange(12) % 2 * 2 + 1)
    return train(small_config(folder, "run", class_cond=True, lr_anneal_steps=4, preview=4)).path


def test_a_new_run_has_as_many_label_rows_as_the_data_has_classes(labelled):
    assert load_run(labelled).config.num_classes == 4
    assert load_tensors(labelled / "model000004.pt")["label_emb.weight"].shape[0] == 4
    assert json.loads((labelled / "run.json").read_text())["classes"] == [1, 3]
    assert main(["--resume", str(labelled)]) == 0


def test_only_classes_of_the_data_are_sampled(labelled, tmp_path, capsys):
    doors = (["--run", str(labelled)], ["--model_path", str(labelled / "ema_0.9_000004.pt"), "--steps", "2"])
    for number, door in enumerate(doors):
        out = tmp_path / str(number)
        assert sample.main([*door, "--num_samples", "30", "--out", str(out)]) == 0
        archive = np.load(next(out.glob("*.npz")))
        assert set(archive["arr_1"].tolist()) == {1, 3}
        capsys.readouterr()
        assert sample.main([*door, "--num_samples", "2", "--classes", "1,2", "--out", str(out)]) == 2
        assert "classes: got 2; expected classes that the model was trained on: 1, 3" in capsys.readouterr().err


def test_the_preview_shows_classes_of_the_data(labelled, monkeypatch):
    seen = []
    draw = previews.sample
    monkeypatch.setattr(previews, "sample", lambda *a, **k: seen.append(k["model_kwargs"]["y"]) or draw(*a, **k))
    (labelled / "samples" / "base_000004.png").unlink()
    assert main(["--resume", str(labelled)]) == 0
    assert set(seen[0].tolist()) <= {1, 3}


def test_files_of_improved_diffusion_have_a_thousand_classes(labelled, tmp_path):
    from tdc_fast.runs.build import build_unet

    config = small_config(
        labelled.parent, "base", class_cond=True, base=str(tmp_path / "ema.pt"), **{**SHORT, "k": 1.0}
    )
    torch.save(build_unet(config, 1).state_dict(), tmp_path / "ema.pt")
    run = train(config.replace(stop_after="stage1"))
    assert run.config.num_classes == 1000 and run.classes == [1, 3]
    ours = config.replace(base=str(labelled), run_dir=str(tmp_path / "ours"), stop_after="stage1")
    assert train(ours).config.num_classes == 4


def test_a_run_older_than_the_record_of_its_classes_samples_all(labelled, tmp_path):
    old = Path(shutil.copytree(labelled, tmp_path / "old"))
    facts = json.loads((old / "run.json").read_text())
    del facts["classes"], facts["class_counts"]
    (old / "run.json").write_text(json.dumps(facts))
    assert from_run(old).classes == (0, 1, 2, 3)


# --- kills


def test_a_preview_that_a_kill_prevented_is_drawn_when_the_run_goes_on(run, two_stages):
    shutil.rmtree(run / "samples")
    assert main(["--resume", str(run)]) == 0
    assert differences(two_stages, run) == []
    for picture in ("base_000004.png", "experts_000004.png"):
        assert (run / "samples" / picture).read_bytes() == (two_stages / "samples" / picture).read_bytes()


def killed_at_rename(number: int):
    rename, done = os.replace, [0]

    def dying(source, target):
        done[0] += 1
        if done[0] == number:
            raise KeyboardInterrupt  # everything that a kill leaves, but for temporary files
        rename(source, target)

    return dying


def test_widths_and_their_cost_are_of_one_search_wherever_a_kill_falls(folder, monkeypatch):
    monkeypatch.setattr(pruning, "draw_search", lambda *arguments: None)
    config = small_config(folder, "searched", **{**SHORT, "stop_after": "pruning"})
    train(config)
    first = Path(config.run_dir)
    whole = Path(shutil.copytree(first, folder / "whole"))
    prune_run(whole, agent="random", candidates=2, progress="never")
    old, new = WidthPlan.load(first / "widths.json"), WidthPlan.load(whole / "widths.json")
    assert old != new
    found = []  # the second search, which is the same every time; what is tested is how it is written

    def search_once(*arguments, plan=pruning.plan_pruning, **settings):
        if not found:
            found.append(plan(*arguments, **settings))
        return found[0]

    monkeypatch.setattr(pruning, "plan_pruning", search_once)
    seen = set()
    for number in range(1, 6):
        path = Path(shutil.copytree(first, folder / f"killed{number}"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed_at_rename(number))
            with contextlib.suppress(KeyboardInterrupt):
                prune_run(path, agent="random", candidates=2, progress="never")
        agent = load_run(path).macs["phases"]["pruning"]["agent"]
        expected = new if agent == "random" else old
        assert load_run(path).widths == expected, number
        assert main(["--resume", str(path), "--stop_after", "pruning"]) == 0
        assert WidthPlan.load(path / "widths.json") == expected
        assert not (path / "widths.next.json").exists()
        seen.add(agent)
    assert len(seen) == 2
