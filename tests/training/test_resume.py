"""Runs that die: by kill -9 at any moment, by Ctrl-C, or with a file damaged afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import random
import shutil
import signal
import termios
import time
from pathlib import Path

import pytest
import torch

from tdc_fast.experiments.measure import count_parameters
from tdc_fast.train import main, train
from tdc_fast.training import RunDirectory, load_run
from tests.training.small_run import (
    STAGE2_OPTIONS,
    TWO_STAGES,
    differences,
    flags,
    rows,
    small_config,
    train_in_child,
    train_on_terminal,
)


@pytest.fixture(scope="module")
def processes():
    """Processes that start within a tenth of a second: forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tdc_fast.train", "tdc_fast.data.dataset", "tdc_fast.pruning.search", "tyro", "torch._dynamo"]
    )
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"

    def start(argv: list[str], output: Path, kill_at_rename: int = 0):
        process = context.Process(target=train_in_child, args=(argv, str(output), kill_at_rename))
        process.start()
        return process

    def start_on_terminal(argv: list[str], terminal: str):
        process = context.Process(target=train_on_terminal, args=(argv, terminal))
        process.start()
        return process

    start.on_terminal = start_on_terminal

    yield start
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory, processes):
    """A finished two-stage run with everything random switched on, and the time it took."""
    folder = tmp_path_factory.mktemp("unkilled")
    # Three timesteps: the loss-aware sampler leaves its warm-up. Seven images: three groups do not divide them.
    random_parts = {"dropout": 0.2, "schedule_sampler": "loss-second-moment", "diffusion_steps": 3, "batch_size": 7}
    config = small_config(folder, grad_clip=1.0, **random_parts, **STAGE2_OPTIONS, **TWO_STAGES)
    began = time.monotonic()
    process = processes(flags(config), folder / "output.txt")
    process.join()
    assert process.exitcode == 0, (folder / "output.txt").read_text()
    return folder, config, time.monotonic() - began


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_never_killed(unkilled, processes, tmp_path, seed):
    folder, config, duration = unkilled
    choose = random.Random(seed)
    # Instead of the n-th rename: in the middle of a save, of a log's rewriting, of the run's first files.
    renames = [("rename", choose.randint(1, 25)) for _ in range(4)]
    seconds = [("seconds", choose.uniform(0.1, 0.7) * duration) for _ in range(2)]
    deaths = [*renames[:2], seconds[0], renames[2], seconds[1], renames[3]]
    argv = [*flags(config.replace(run_dir=str(tmp_path / "run"))), "--resume"]
    killed = 0
    for kind, when in deaths:
        process = processes(argv, tmp_path / "output.txt", int(when) if kind == "rename" else 0)
        process.join(when if kind == "seconds" else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "output.txt").read_text()
        killed += process.exitcode != 0
    process = processes(argv, tmp_path / "output.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    assert killed >= 2  # a machine that gets faster may finish within the seconds; the renames come first
    assert differences(folder / "run", tmp_path / "run") == []


def test_a_run_reads_back_as_experts_that_share_layers(unkilled):
    run = load_run(unkilled[1].run_dir)
    model = run.experts()
    assert model.shared["input_blocks.0.0"] == (0, 0, 0) and model.shared["output_blocks.0.0.in_layers.0"] == (0, 0, 1)
    x, t = torch.randn(3, 1, 8, 8), torch.arange(3)
    with torch.no_grad():
        mixed = model(x, t)
        for group in range(3):
            alone = model.expert(group).eval()(x[group, None], t[group, None])
            torch.testing.assert_close(mixed[group, None], alone)
    apart = [sum(p.numel() for p in model.expert(group).parameters()) for group in range(3)]
    assert max(apart) < count_parameters(model) < sum(apart)
    wide = model.expert(2).get_submodule("middle_block.0.in_layers.2").weight
    narrow = model.expert(0).get_submodule("middle_block.0.in_layers.2").weight
    widest, least = max(len(wide), len(narrow)), min(len(wide), len(narrow))
    assert least < widest and torch.equal(wide[:least], narrow[:least])


def test_a_run_that_ends_before_its_experts_goes_on_like_one_that_never_did(unkilled, tmp_path, capsys):
    folder, config, _ = unkilled
    shutil.copy(folder / "images.npz", tmp_path)
    run = Path(config.run_dir.replace(str(folder), str(tmp_path)))
    there = config.replace(data_dir=str(tmp_path / "images.npz"), run_dir=str(run), num_threads=1)
    assert main([*flags(there), "--stop_after", "stage1"]) == 0
    assert f"stopped after stage1: {run}" in capsys.readouterr().out
    assert not (run / "widths.json").exists()
    assert main(["--resume", str(run), "--stop_after", "pruning"]) == 0
    assert (run / "widths.json").exists() and not (run / "experts").exists()
    assert main(["--resume", str(run)]) == 0
    assert differences(Path(config.run_dir), run) == []


def test_ctrl_c_saves_at_the_next_step_and_says_how_to_go_on(unkilled, processes, tmp_path):
    folder, config, _ = unkilled
    run = tmp_path / "run"
    process = processes(flags(config.replace(run_dir=str(run), save_interval=1000)), tmp_path / "output.txt")
    while not (run / "base" / "progress.csv").exists():
        assert process.is_alive(), (tmp_path / "output.txt").read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 130, output
    assert f"python -m tdc_fast.train --resume {run}" in output
    saved = sorted((run / "base").glob("state*.pt"))
    assert len(saved) == 1 and saved[0].name != "state000010.pt"
    process = processes(["--resume", str(run)], tmp_path / "output.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    for name in ("base/model000010.pt", "experts/ema_0.99_000010.pt"):
        assert (run / name).read_bytes() == (folder / "run" / name).read_bytes()
    assert rows(run / "experts/progress.csv") == rows(folder / "run/experts/progress.csv")


def test_a_closed_terminal_saves_at_the_next_step_though_nothing_can_be_printed(processes, tmp_path):
    config = small_config(tmp_path, lr_anneal_steps=10**6, save_interval=10**6, log_interval=1, progress="always")
    shell, terminal = pty.openpty()
    termios.tcsetwinsize(shell, (24, 80))
    process = processes.on_terminal(flags(config), os.ttyname(terminal))
    try:
        while b"loss=" not in os.read(shell, 4096):
            pass
        os.close(terminal)
        os.close(shell)  # the kernel sends SIGHUP
        process.join(30)
        assert process.exitcode == 130
    finally:
        process.kill()
    (saved,) = (tmp_path / "run").glob("state*.pt")
    assert int(saved.stem.removeprefix("state")) >= 1


@pytest.fixture
def interrupted(unkilled, tmp_path) -> Path:
    """A run that stopped after step 8 of 10 of its second stage, with checkpoints of steps 4 and 8."""
    folder, _, _ = unkilled
    shutil.copytree(folder / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "experts").glob("*000010.*"):
        path.unlink()
    return tmp_path / "run"


def refusal(run: Path, *more: str) -> str:
    """What the command line says when it refuses to resume."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as output:
        assert main(["--resume", str(run), *more]) == 2
    return output.getvalue()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model000008.pt", "truncated"),
        ("ema_0.9_000008.pt", "flipped"),
        ("opt000008.pt", "missing"),
        ("state000008.pt", "flipped"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_with_the_last_good_one(interrupted, name, damage):
    path = interrupted / "experts" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flipped":
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    message = refusal(interrupted)
    assert str(path) in message
    assert f"--resume {interrupted} --resume_step 4" in message


def test_the_offered_checkpoint_leads_to_the_same_end(interrupted, unkilled):
    (interrupted / "experts" / "opt000008.pt").write_bytes(b"")
    written = (interrupted / "base" / "model000010.pt").stat().st_mtime_ns
    assert main(["--resume", str(interrupted), "--resume_step", "4"]) == 0
    assert (interrupted / "base" / "model000010.pt").stat().st_mtime_ns == written  # the finished stage stays
    assert differences(unkilled[0] / "run", interrupted) == []


def test_a_checkpoint_chosen_in_stage_1_does_not_stop_stage_2(interrupted, unkilled, processes, tmp_path):
    for later in ("experts", "widths.json", "groups.json", "macs.json"):
        path = interrupted / later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (interrupted / "base" / "opt000010.pt").write_bytes(b"")
    assert "--resume_step 8" in refusal(interrupted)
    process = processes(["--resume", str(interrupted), "--resume_step", "8"], tmp_path / "output.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    assert differences(unkilled[0] / "run", interrupted) == []


def test_a_checkpoint_of_another_run_is_refused_by_name(interrupted, unkilled, tmp_path):
    other = train(small_config(tmp_path, "other", seed=5, **TWO_STAGES))
    for path in (other.path / "experts").glob("*000008.*"):
        shutil.copy(path, interrupted / "experts")
    message = refusal(interrupted)
    assert "state000008.json belongs to another run" in message
    assert "--resume_step 4" in message


def test_a_weight_file_swapped_for_another_runs_is_refused_by_name(interrupted, unkilled):
    shutil.copy(interrupted / "experts" / "model000004.pt", interrupted / "experts" / "model000008.pt")
    assert "model000008.pt is damaged or from another run" in refusal(interrupted)


def test_an_unfinished_checkpoint_is_no_damage(interrupted, unkilled):
    (interrupted / "experts" / "state000008.json").unlink()
    (interrupted / "experts" / "model000008.pt").write_bytes(b"half")
    assert main(["--resume", str(interrupted)]) == 0
    assert differences(unkilled[0] / "run", interrupted) == []


def test_the_options_of_a_run_cannot_change_under_it(interrupted):
    assert "batch_size: got 8; expected 7" in refusal(interrupted, "--batch_size", "8")
    description = json.loads((interrupted / "config.json").read_text())
    (interrupted / "config.json").write_text(json.dumps({**description, "lr": 0.5}))
    assert "config.json" in refusal(interrupted)


def test_run_json_without_the_channels_is_named(interrupted):
    facts = json.loads((interrupted / "run.json").read_text())
    del facts["in_channels"]
    (interrupted / "run.json").write_text(json.dumps(facts))
    assert "run.json" in refusal(interrupted)


def test_a_directory_without_a_run_is_not_resumed(tmp_path):
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing")


def test_a_new_run_never_writes_into_an_old_one(interrupted):
    with pytest.raises(ValueError, match="--resume"):
        RunDirectory.create(small_config(interrupted.parent), 1)


def test_a_run_that_another_process_works_on_is_left_alone(interrupted):
    leftover = interrupted / "base" / ".half.tmp"  # of the process at work, perhaps
    with RunDirectory.open(interrupted).writing():
        leftover.touch()
        assert "run_dir" in refusal(interrupted)
        assert leftover.exists()
    with RunDirectory.open(interrupted).writing():
        assert not leftover.exists()


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    run = train(small_config(tmp_path, lr_anneal_steps=4))
    torch.save({"weights": Bomb()}, run.path / "ema_0.9_000004.pt")
    (run.path / "ema_0.9_000004.json").unlink()
    with pytest.raises(ValueError, match="ema_0.9_000004.pt"):
        load_run(run.path).base()
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_base_under_its_experts_is_refused_with_what_to_do(interrupted):
    (interrupted / "base" / "ema_0.9_000010.pt").write_bytes(b"")
    message = refusal(interrupted)
    assert "base/ema_0.9_000010.pt is damaged" in message and "--resume_step 8" in message
    assert f"move {interrupted / 'experts'} away first" in message
