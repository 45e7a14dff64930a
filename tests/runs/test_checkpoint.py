"""Checkpoints that are whole or do not count, and file names that carry steps."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.runs.checkpoint import (
    choose_checkpoint,
    finished_steps,
    save_checkpoint,
    state_file,
    step_of,
)
from tdc_fast.runs.weights import load_verified


@pytest.mark.parametrize(
    ("name", "step"), [("model000100.pt", 100), ("ema_0.9999_1234567.pt", 1234567), ("opt000000.pt", 0)]
)
def test_the_step_is_in_the_name(name, step):
    assert step_of("some/where/" + name) == step


@pytest.mark.parametrize("name", ["model.pt", "model_100.pt", "model000100.bin", "latest.pt"])
def test_a_name_without_a_step_is_refused(name):
    with pytest.raises(ValueError, match=name):
        step_of(name)


def save(directory, step, **description):
    contents = {f"model{step:06d}.pt": {"w": torch.full((3,), float(step))}, state_file(step): {"step": step}}
    save_checkpoint(directory, step, contents, {"identity": "mine", **description})


def test_the_latest_checkpoint_is_chosen_and_only_finished_ones_count(tmp_path):
    assert choose_checkpoint(tmp_path, {"identity": "mine"}, -1, tmp_path) is None
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "model000015.pt").write_bytes(b"")
    assert finished_steps(tmp_path) == [5, 10]
    assert choose_checkpoint(tmp_path, {"identity": "mine"}, -1, tmp_path) == 10
    assert choose_checkpoint(tmp_path, {"identity": "mine"}, 5, tmp_path) == 5
    assert choose_checkpoint(tmp_path, {"identity": "mine"}, 0, tmp_path) is None
    with pytest.raises(ValueError, match="no checkpoint of that step.*last good checkpoint is step 10"):
        choose_checkpoint(tmp_path, {"identity": "mine"}, 7, tmp_path)


def test_where_nothing_is_good_the_beginning_is_offered(tmp_path):
    save(tmp_path, 5, identity="theirs")
    with pytest.raises(ValueError, match="state000005.json belongs to another run: its identity.*--resume_step 0"):
        choose_checkpoint(tmp_path, {"identity": "mine"}, -1, tmp_path)


def test_a_file_that_is_not_the_one_described_does_not_load(tmp_path):
    save(tmp_path, 5)
    path = tmp_path / "model000005.pt"
    assert load_verified(path)["w"].tolist() == [5, 5, 5]
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match="model000005.pt.*sha256"):
        load_verified(path)
