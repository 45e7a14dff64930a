"""What is left of a run whose exchanges are broken off, the errors of other processes, and how processes meet."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tdc_fast.distributed import LostProcess, World, is_of_all, joined
from tdc_fast.distributed.connections import UNANSWERED, watched
from tests.distributed.launcher import Launcher, free_port, join_again


def interrupt() -> None:
    raise KeyboardInterrupt


def test_after_a_broken_exchange_a_process_waits_for_nobody():
    """Else a process that gets Ctrl-C while it receives would wait for one that still sends."""
    this = World(0, 2)
    with pytest.raises(KeyboardInterrupt), this.exchange():
        interrupt()
    for exchange in (
        lambda: this.from_first(int),
        lambda: this.by_first(int),
        lambda: this.together(int),
        lambda: this.sum(torch.ones(1)),
        lambda: this.largest(1),
        lambda: this.to_first(1, "set-up"),
        lambda: this.from_first_to_each(int, "set-up"),
    ):
        with pytest.raises(LostProcess, match="was broken off"):
            exchange()
    for tell in (this.from_first, this.by_first):
        with pytest.raises(KeyboardInterrupt) as raised:  # what the process was stopped by, not that it was
            tell(interrupt)
        assert not is_of_all(raised.value)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("a: got 1"), ValueError, "process 1: a: got 1"),
        (
            UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
            ValueError,
            "process 1: 'utf-8' codec can't decode byte 0x78 in position 0: bad",
        ),
        (FileNotFoundError(2, "No such file", "x"), OSError, "process 1: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_an_error_of_another_process_is_told_as_its_own(error, kind, text):
    class Others(World):
        def _gather(self, value, kind):
            return [value, (None, error)]

    with pytest.raises(kind) as raised:
        Others(0, 2).together(int)
    assert str(raised.value) == text and is_of_all(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "2", "a number below 2"),
        ("RANK", "first", "a number below 2"),
        ("LOCAL_RANK", "-1", "a number below 2"),
        ("MASTER_PORT", "99999", "a number below 65536"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused_by_name(monkeypatch, name, value, expected):
    """Nobody would ever come to a process with the number 2 of 2."""
    good = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for variable, content in {**good, name: value}.items():
        monkeypatch.setenv(variable, str(content))
    said = f"^{name}: got '{value}'; expected {expected}, as torchrun sets it$"
    with pytest.raises(ValueError, match=said), joined():
        pass


def test_processes_that_torchrun_started_are_joined_more_than_once(tmp_path):
    """What they wrote the first time is still in torchrun's store, and would send them to connections that are gone."""
    import torch.distributed as dist

    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    more = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert Launcher().run(2, join_again, output=tmp_path / "output.txt", **more) == ["3 True\n3 True\n"] * 2
    del store


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="the system does not list the files of a process")
def test_the_system_asks_whether_the_other_side_of_a_new_connection_is_still_there():
    """Else a machine that goes away without a word is waited for as long as a search may take."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as before:
        with watched():
            one = socket.create_connection(server.getsockname())
            other, another = socket.socketpair()
        with one, other, another:
            asked = {each: each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in (before, one, other)}
            assert list(asked.values()) == [0, 1, 0]
            if hasattr(socket, "TCP_KEEPIDLE"):
                names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                idle, every, count, unsent = (one.getsockopt(socket.IPPROTO_TCP, getattr(socket, n)) for n in names)
                assert idle + every * count == unsent / 1000 == UNANSWERED == 300
