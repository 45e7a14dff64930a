"""What signals do to a loop that asks for them to be kept: it ends at a step boundary, and nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from tdc_fast.train import train
from tdc_fast.training.interrupts import StopRequest, TrainingInterrupted
from tdc_fast.training.loop import StageLoop
from tests.training.small_run import small_config

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks_and_every_handler_comes_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_ctrl_c_ends_at_once_and_a_second_hangup_does_not():
    with StopRequest():
        for _ in range(3):  # as the kernel and the shell send it
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("step", "last"), [(2, "there is no checkpoint yet"), (6, "the last good checkpoint is step 4 of stage base")]
)
def test_a_second_ctrl_c_in_a_stage_says_what_is_saved(step, last, tmp_path, monkeypatch):
    train_step = StageLoop._train_step

    def interrupted(loop):
        if loop.step == step:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        train_step(loop)

    monkeypatch.setattr(StageLoop, "_train_step", interrupted)
    config = small_config(tmp_path, lr_anneal_steps=8)
    with pytest.raises(TrainingInterrupted) as stopped:
        train(config)
    again = f"continue with: python -m tdc_fast.train --resume {config.run_dir}"
    assert str(stopped.value) == f"stopped at once in stage base; {last}; {again}"
