"""One writer at a time in a run directory, by a lock that ends with its process even if that is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdc_fast.errors import invalid

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    try:
        import msvcrt
    except ImportError:
        msvcrt = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
"""What is locked where directories cannot be."""


@contextmanager
def sole_writer(directory: Path, argument: str = "run_dir") -> Iterator[None]:
    """Lock a directory for this process. Where the system or the file system has no locks, nothing is locked.

    Args:
        directory: the directory, which exists.
        argument: what named it, for the error.

    Raises:
        ValueError: another process works on it.
    """
    if fcntl is not None:
        descriptor = os.open(directory, os.O_RDONLY)
    else:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        _lock(descriptor, directory, argument)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path, argument: str) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:
        kind = "run" if argument == "run_dir" else "folder"
        remedy = f"a {kind} that no other process is working on: wait for it, or stop it"
        raise invalid(argument, str(directory), remedy) from error
    except OSError:
        pass  # some network file systems lock nothing
