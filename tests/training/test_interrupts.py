"""What signals do to a loop that asks for them to be kept: it ends at a step boundary, and nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from tdc_fast.training.interrupts import StopRequest

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
