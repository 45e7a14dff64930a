"""Runs of 1, 2 and 4 processes by gloo: the same samples, the same files, and the same experts, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tdc_fast.runs.checkpoint import find_problem, finished_steps
from tdc_fast.training import load_run
from tests.distributed.launcher import (
    Launcher,
    end,
    train_command,
    train_counting,
    train_experts_unconnected,
    train_in,
)
from tests.training.small_run import TWO_STAGES, differences, flags, rows, small_config, write_images

SETTINGS = {
    **TWO_STAGES, "batch_size": 13, "class_cond": True, "diffusion_steps": 6, "ema_ramp": True, "k": 0.5,
    "schedule_sampler": "loss-second-moment",
    "agent": "greedy", "rounds": 2, "candidates": 3,
}  # fmt: skip
"""The sampler leaves its warm-up after 5 steps of 10; 13 images divide among neither 3 experts nor 2 or 4 processes."""
RANDOM = {
    **SETTINGS, "agent": "auto", "rounds": 1, "stage2_lr_factors": "1,0.5,0.25",
    "grad_clip": 1.0, "weight_decay": 0.1, "microbatch": 3, "dropout": 0.2, "label_dropout": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def launcher():
    return Launcher()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, launcher):
    """One process: the run, and a copy of it from before its pruning."""
    folder = tmp_path_factory.mktemp("alone")
    config = small_config(folder, "split", **SETTINGS)
    launcher.run(1, train_command, [*flags(config), "--stop_after", "stage1"], output=folder / "split.txt")
    shutil.copytree(folder / "split", folder / "one")
    launcher.run(1, train_command, ["--resume", str(folder / "one")], output=folder / "one.txt")
    return folder, config


@pytest.fixture(scope="module")
def shared_base(alone, launcher):
    """Four processes train the base of that run."""
    folder, config = alone
    argv = [*flags(config.replace(run_dir=str(folder / "four"), microbatch=1)), "--stop_after", "stage1"]
    return folder / "four", launcher.run(4, train_counting, argv, output=folder / "four.txt")


def experts_of(size, alone, launcher):
    folder, _ = alone
    run = folder / f"experts{size}"
    shutil.copytree(folder / "split", run)
    return run, launcher.run(size, train_counting, ["--resume", str(run)], output=folder / f"{run.name}.txt")


@pytest.fixture(scope="module")
def two_experts(alone, launcher):
    """Two processes go on with the run of one."""
    return experts_of(2, alone, launcher)


@pytest.fixture(scope="module")
def four_experts(alone, launcher):
    """Four do."""
    return experts_of(4, alone, launcher)


@pytest.fixture(params=["two_experts", "four_experts"])
def shared_experts(request):
    return request.getfixturevalue(request.param)


def bytes_of(said: list[str]) -> list[dict[str, dict[str, int]]]:
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_four_processes_train_a_base_as_one_does(alone, shared_base):
    folder, _ = alone
    one, four = (rows(path / "base" / "progress.csv") for path in (folder / "one", shared_base[0]))
    assert len(one) == len(four) == 4
    for left, right in zip(one, four, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            if name in ("step", "samples", "macs"):
                assert value == right[name]
            else:
                assert float(value or 0) == pytest.approx(float(right[name] or 0), rel=2e-5), name
    names = [{path.name for path in (run / "base").iterdir()} for run in (folder / "split", shared_base[0])]
    assert names[0] == names[1]
    states = [
        torch.load(run / "base" / "state000010.pt", weights_only=True) for run in (folder / "split", shared_base[0])
    ]
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])
    assert states[0]["data"] == states[1]["data"]
    torch.testing.assert_close(states[1]["sampler"], states[0]["sampler"], rtol=1e-4, atol=0)


def test_gradients_are_sent_once_a_step_whatever_the_microbatches(alone, shared_base):
    parameters = sum(p.numel() for p in load_run(alone[1].run_dir).base().parameters())
    for sent in bytes_of(shared_base[1]):
        assert sent["counted"]["base gradients"] == 10 * 4 * parameters
        assert sent["seen"]["base all_reduce of a team"] == 10 * 4 * parameters


def test_a_search_finds_and_remembers_the_same(alone, shared_experts):
    (folder, _), (run, _) = alone, shared_experts
    for name in ("memory.jsonl", "widths.json", "macs.json"):
        assert (run / name).read_bytes() == (folder / "one" / name).read_bytes()
    assert (run / "memory.jsonl").read_text().count('"event": "sensitivity"') == 2


def test_experts_are_those_of_a_run_of_one_process(alone, shared_experts):
    """With two byte for byte; of four, two train one expert, and others have narrower tensors, so that sums differ."""
    (folder, _), (run, said) = alone, shared_experts
    if len(said) == 2:
        assert [name for name in differences(folder / "one", run) if "progress.csv" not in name] == []
    one, several = load_run(folder / "one").experts(), load_run(run).experts()
    for expert in range(3):
        torch.testing.assert_close(several.expert_state(expert), one.expert_state(expert), rtol=0, atol=2e-3)
    for left, right in zip(*(rows(path / "experts" / "progress.csv") for path in (folder / "one", run)), strict=True):
        assert {n: float(v or 0) for n, v in left.items()} == pytest.approx(
            {n: float(v or 0) for n, v in right.items()}, rel=1e-4
        )


def test_no_gradient_leaves_a_process_in_stage_2(shared_experts):
    run, said = shared_experts
    experts = [load_run(run).experts().expert(0)] if len(said) == 4 else []
    for rank, sent in enumerate(bytes_of(said)):
        counted = {kind: count for kind, count in sent["counted"].items() if kind.startswith("experts")}
        seen = {kind: count for kind, count in sent["seen"].items() if kind.startswith("experts")}
        shared = sum(p.numel() for p in experts[0].parameters()) * 4 * 10 if experts and rank < 2 else 0
        assert counted.get("experts gradients", 0) == seen.get("experts all_reduce of a team", 0) == shared
        assert sum(counted.values()) == sum(seen.values())  # nothing is sent that is not counted
        assert 0 < counted["experts telemetry"] < 200_000


def test_only_the_first_process_prints(shared_experts):
    first, *others = shared_experts[1]
    assert "experts by process: " in first and "finished: " in first
    assert all(len(text.splitlines()) == 1 for text in others)  # the counts of this test


@pytest.fixture(scope="module")
def two(tmp_path_factory, launcher):
    """Two processes, everything random switched on, from beginning to end."""
    folder = tmp_path_factory.mktemp("two")
    config = small_config(folder, **RANDOM)
    launcher.run(2, train_command, flags(config), output=folder / "run.txt")
    return folder, config


def test_stopped_killed_and_resumed_a_run_of_two_ends_bit_for_bit(two, launcher, tmp_path):
    folder, config = two
    shutil.copy(folder / "images.npz", tmp_path)
    run = tmp_path / "run"
    argv = flags(config.replace(data_dir=str(tmp_path / "images.npz"), run_dir=str(run)))

    def ended(argv, signals, name):
        processes = launcher.start(2, train_command, argv, signals, output=tmp_path / f"{name}.txt")
        return end(processes), [(tmp_path / f"{name}.{rank}").read_text() for rank in range(2)]

    # One process gets SIGTERM: both stop after the same step, which is saved.
    codes, said = ended(argv, {(1, "base", 2): signal.SIGTERM}, "stopped")
    assert codes == [130, 130], said
    (step,) = finished_steps(run / "base")[-1:]
    assert f"stopped after step {step} of stage base, which is saved; continue with: " in said[0] and not said[1]
    # One process is killed: the other one says so, and the last checkpoint is whole.
    codes, said = ended(["--resume", str(run)], {(1, "experts", 6): signal.SIGKILL}, "killed")
    assert codes == [2, -signal.SIGKILL], said
    assert "error: another process of the run has ended" in said[0]
    assert "the last good checkpoint is step 4 of stage experts" in said[0]
    assert finished_steps(run / "experts") == [4] and find_problem(run / "experts", 4, {}) is None
    codes, said = ended(["--resume", str(run)], {}, "finished")
    assert codes == [0, 0], said
    extra = [f"{run}/base/{p.name}" for p in (run / "base").glob(f"*{step:06d}.*")]
    found = [name for name in differences(folder / "run", run) if name.removesuffix(" is extra") not in extra]
    assert found == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_during_the_search_stops_all(alone, launcher, tmp_path, rank):
    run = tmp_path / "run"
    shutil.copytree(alone[0] / "split", run)
    signals = {(rank, "pruning", 1): signal.SIGTERM}
    processes = launcher.start(2, train_command, ["--resume", str(run)], signals, output=tmp_path / "output.txt")
    codes = end(processes)
    said = [(tmp_path / f"output.{number}").read_text() for number in range(2)]
    assert codes == [130, 130] and said[1] == "", said
    assert f"stopped between two stages; continue with: python -m tdc_fast.train --resume {run}" in said[0]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [(0, "process 1: data_dir: got 'images.npz'; expected "), (19, "one has 19, and another 20\n")],
)
def test_a_machine_without_the_same_images_is_refused_once(launcher, tmp_path, theirs, said):
    config = small_config(tmp_path, lr_anneal_steps=4)
    (tmp_path / "other").mkdir()
    if theirs:
        write_images(tmp_path / "other", count=theirs)
    argv = flags(config.replace(data_dir="images.npz"))
    folders = [str(tmp_path), str(tmp_path / "other")]
    codes = end(launcher.start(2, train_in, folders, argv, output=tmp_path / "output.txt"))
    texts = [(tmp_path / f"output.{rank}").read_text() for rank in range(2)]
    assert codes == [2, 2] and said in texts[0] and texts[1] == "" and not Path(config.run_dir).exists(), texts


def test_a_batch_without_a_sample_for_each_process_is_refused_once(launcher, tmp_path):
    config = small_config(tmp_path, batch_size=1, lr_anneal_steps=4)
    processes = launcher.start(2, train_command, flags(config), output=tmp_path / "output.txt")
    codes = end(processes)
    said = [(tmp_path / f"output.{rank}").read_text() for rank in range(2)]
    assert codes == [2, 2] and not Path(config.run_dir).exists()
    assert said == ["error: batch_size: got 1; expected at least 2: an image for each process in every step\n", ""]


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 2)])
def test_a_process_trains_its_experts_bit_for_bit_as_without_the_others(request, launcher, tmp_path, size, rank):
    """Of two also where gradients are clipped, batches are split and dropout draws."""
    folder = request.getfixturevalue("two" if size == 2 else "four_experts")[0]
    together = folder / "run" if size == 2 else folder
    said = together.with_suffix(".0").read_text()
    run, path = tmp_path / "run", tmp_path / "experts.pt"
    shutil.copytree(together, run)
    shutil.rmtree(run / "experts")
    launcher.run(1, train_experts_unconnected, str(run), rank, size, str(path), output=tmp_path / "output.txt")
    groups = [int(group) for group in re.search(rf"process {rank}: ([\d, ]+) \(", said)[1].split(",")]
    experts, apart = load_run(together).experts(), torch.load(path, weights_only=True)
    assert len(groups) == len(apart) == 4 // size
    for group, state in zip(groups, apart, strict=True):
        expected = experts.expert_state(group)
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
