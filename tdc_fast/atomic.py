"""Atomic writes: whenever the process or the machine stops, a file has its old content or its new one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that gets its name when it is complete and on the disk.

    It is written under a temporary name, synced and renamed, and then the directory is synced. If the block raises, the
    old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # named after the file that the caller knows
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sync_directory(directory: Path) -> None:
    """Sync a directory, so that renames in it survive a crash of the machine, where the system can."""
    if os.name == "nt":  # Windows opens no directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, name: str = "*", *, of_dead_processes_only: bool = False) -> None:
    """Delete the temporary files of killed processes from a directory.

    Args:
        directory: where they are.
        name: pattern of the names that the files were to get.
        of_dead_processes_only: keep those of processes that still run here, as no lock says that there are none.
    """
    for leftover in directory.glob(f".{name}.tmp"):
        process = leftover.suffixes[-2][1:] if len(leftover.suffixes) > 1 else ""
        if not (of_dead_processes_only and process.isdigit() and _runs(int(process))):
            leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # whatever it is, this process does not write it now
    if os.name != "posix":
        return True  # there, signal 0 is Ctrl-C
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sha256_of(file: IO[bytes]) -> str:
    """The sha256 of a whole open file, in hex; leaves the position at its end."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
