"""Networks and batches that do not fit the memory: refused in one sentence that says what to lower."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tdc_fast import prune, sample, train
from tdc_fast.command_line import run_command
from tdc_fast.runs import build
from tests.training.small_run import TWO_STAGES, flags, small_config

HUGE = {"num_channels": 8192, "channel_mult": "1,1", "num_res_blocks": 64}
"""Within the limits of every option: trillions of weights."""


def test_a_network_that_no_machine_holds_is_refused_at_every_door_before_it_is_built(tmp_path, capsys):
    config = small_config(tmp_path, **HUGE, lr_anneal_steps=1)
    split = small_config(tmp_path, **HUGE, **TWO_STAGES, base=str(tmp_path / "base.pt"))
    network = [part for name, value in HUGE.items() for part in (f"--{name}", str(value))]
    began = time.monotonic()
    for command, argv in (
        (train, flags(config)),
        (prune, flags(split)),
        (sample, ["--model_path", str(tmp_path / "base.pt"), *network, "--image_size", "8"]),
    ):
        assert command.main(argv) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: num_channels: got 8192; expected a smaller network") and " GiB, and " in said
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()


def test_training_counts_gradients_optimizer_and_averages(tmp_path, monkeypatch):
    config = small_config(tmp_path, lr_anneal_steps=1)  # two rates of averages
    weights = 4 * sum(parameter.numel() for parameter in build.outline_unet(config, 1).parameters())
    monkeypatch.setattr(build, "_memory", lambda device: 6 * weights - 1)
    with pytest.raises(ValueError, match="^num_channels: got 8; expected a smaller network"):
        train.train(config)
    monkeypatch.setattr(build, "_memory", lambda device: 6 * weights)
    train.train(config)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60),
        lambda: np.empty(2**55),
        lambda: bytes(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ],
    ids=["torch", "numpy", "Python", "CUDA"],
)
def test_an_allocator_that_fails_ends_a_command_in_one_sentence(allocate, capsys):
    assert run_command(lambda arguments: allocate(), [], stopped="") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: out of memory (") and "; lower --batch_size" in said and "--num_channels" in said


def test_another_error_of_the_runtime_is_a_bug_and_shows_where_it_is():
    def command(arguments):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command(command, [], stopped="")
