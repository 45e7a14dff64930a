"""Connections to other machines that end when those no longer answer, as without power or network.

A process that ends closes its connections, and the others notice at once. A machine that goes away without a word does
not: whoever waits for it would wait until the limit of the process group, which is long, as a search may take hours. So
the system asks the other side now and then whether it is still there (TCP's keepalive). gloo has no option for that.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

UNANSWERED = 300
"""Seconds without an answer after which a connection ends."""
_ASKED_AFTER, _ASKED_EVERY = 60, 30
_OPTIONS = {
    "TCP_KEEPIDLE": _ASKED_AFTER,
    "TCP_KEEPINTVL": _ASKED_EVERY,
    "TCP_KEEPCNT": (UNANSWERED - _ASKED_AFTER) // _ASKED_EVERY,
    "TCP_USER_TIMEOUT": 1000 * UNANSWERED,  # milliseconds, for what was sent and not received
}
"""Options of TCP by name, of which a system may lack some."""


@contextmanager
def watched() -> Iterator[None]:
    """The TCP connections that are made in the block end once the other side has not answered for `UNANSWERED` seconds.

    Without effect where the system does not list the files of a process.
    """
    before = _sockets()
    yield
    for descriptor, _ in _sockets() - before:
        with suppress(OSError):  # closed meanwhile, by another thread
            _watch(descriptor)


def _watch(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as found:
        if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
            return
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _OPTIONS.items():
            if hasattr(socket, name):
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _sockets() -> set[tuple[int, int]]:
    """The open sockets of this process: descriptor, and the number of what is behind it."""
    found = set()
    with suppress(OSError):  # as on Windows
        for name in os.listdir("/dev/fd"):
            with suppress(OSError):  # of listing
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(name), status.st_ino))
    return found
