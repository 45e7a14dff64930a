"""Files that cannot be written: the run names each one, what is safe and how to go on, and ends with status 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdc_fast import prune
from tdc_fast.train import main, train
from tests.training.small_run import TWO_STAGES, flags, small_config

SHORT = {**TWO_STAGES, "stage1_steps": 4, "stage2_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("full", ["OSError", "RuntimeError"])
def test_a_full_disk_names_the_file_what_is_free_and_how_to_go_on(folder, monkeypatch, capsys, full):
    config = small_config(folder, f"full{full}", lr_anneal_steps=8)
    save = torch.save

    def failing(content, file):
        if "model000008" in file.name:
            file.write(b"half")
            if full == "OSError":
                raise OSError(28, "No space left on device")
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
        save(content, file)

    monkeypatch.setattr(torch, "save", failing)
    assert main(flags(config)) == 2
    said = capsys.readouterr().err
    path = Path(config.run_dir)
    assert str(path / "model000008.pt") in said and "MiB are free there" in said and "inline_container" not in said
    assert "the last good checkpoint is step 4" in said and f"--resume {path}" in said
    assert not list(path.glob(".*.tmp")) and not (path / "model000008.pt").exists()
    monkeypatch.undo()
    assert main(["--resume", str(path)]) == 0


def test_a_real_limit_on_file_sizes_is_told_in_the_same_way(folder):
    config = small_config(folder, "limited", lr_anneal_steps=4)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "from tdc_fast.train import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags(config)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{config.run_dir}/model000004.pt cannot be written" in done.stderr


def full_disk(monkeypatch, name: str) -> None:
    """Lets every file of a name be on a full disk: appending to it fails, and so does replacing it."""
    rename = os.replace

    def replace(source, target):
        if Path(target).name != name:
            return rename(source, target)
        if Path(target).suffix not in (".csv", ".jsonl") and name != "progress.json":
            raise OSError(28, "No space left on device")
        os.unlink(source)
        return os.symlink("/dev/full", target)  # its header fits, and nothing more

    monkeypatch.setattr(os, "replace", replace)


def assert_told(said: str, path: Path, safe: str, command: str) -> None:
    line = said.splitlines()[-1]
    assert line.startswith(f"error: {path}") and "MiB are free there); " in line and "Traceback" not in said, said
    assert f"; {safe}. Once that is mended, {command}" in line, said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
@pytest.mark.parametrize(
    ("name", "saved"),
    [("progress.csv", 0), ("progress.json", 0), ("log.txt", 0), ("macs.json", 4), ("base_000004.png", 4)],
)
def test_what_is_written_beside_the_checkpoints_of_a_run_is_named(folder, tmp_path, monkeypatch, capsys, name, saved):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv,log,json")
    config = small_config(folder, tmp_path.name, lr_anneal_steps=4, preview=1)
    run = Path(config.run_dir)
    run.mkdir()
    file = run / ("samples" if name.endswith(".png") else "") / name
    with monkeypatch.context() as patched:
        full_disk(patched, name)
        if name == "log.txt":
            file.symlink_to("/dev/full")
        assert main(flags(config)) == 2
    safe = "the last good checkpoint is step 4 of stage base" if saved else "there is no checkpoint yet"
    assert_told(capsys.readouterr().err, file, safe, f"continue with: python -m tdc_fast.train --resume {run}")
    file.unlink(missing_ok=True)
    assert main(["--resume", str(run)]) == 0
    assert file.is_file() and not list(run.rglob(".*.tmp"))


def test_a_folder_that_cannot_be_made_in_a_run_is_named(folder, capsys):
    pytest.importorskip("tensorboard")
    config = small_config(folder, "no_board", lr_anneal_steps=4, tensorboard=True)
    board = Path(config.run_dir) / "tensorboard"
    board.parent.mkdir()
    board.write_text("a file")
    assert main(flags(config)) == 2
    command = f"continue with: python -m tdc_fast.train --resume {config.run_dir}"
    assert_told(capsys.readouterr().err, board, "there is no checkpoint yet", command)


@pytest.fixture(scope="module")
def to_prune(folder):
    changes = {**SHORT, "groups": 2, "diffusion_steps": 8, "agent": "random", "candidates": 2, "stop_after": "stage1"}
    return train(small_config(folder, "to_prune", **changes)).path


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
@pytest.mark.parametrize("name", ["widths.png", "memory.jsonl", "widths.next.json"])
def test_what_a_search_writes_is_named(to_prune, tmp_path, monkeypatch, capsys, name):
    run = Path(shutil.copytree(to_prune, tmp_path / "run"))
    safe = "the last good checkpoint is step 4 of stage base"
    with monkeypatch.context() as patched:
        full_disk(patched, name)
        if name == "memory.jsonl":
            (run / name).symlink_to("/dev/full")
        assert prune.main(["--run", str(run)]) == 2
        again = f"the same command continues from {run / 'memory.jsonl'}"
        assert_told(capsys.readouterr().err, run / name, safe, again)
    if name == "widths.next.json":
        assert prune.main(["--run", str(run)]) == 0 and (run / "widths.json").is_file()
