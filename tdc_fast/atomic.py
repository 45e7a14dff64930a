"""Atomic writes: whenever the process or the machine stops, a file has its old content or its new one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that gets its name when it is complete and on the disk.

    It is written under a temporary name, synced and renamed, and then the directory is synced. If the block raises, the
    old file stays.

    Raises:
        OSError: as `write_error`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise write_error(path, error) from error
        raise
    finally:
        with suppress(OSError):  # of the folder, which then has been named
            temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Let an OSError in the block, where a file is opened, appended to or closed, name that file.

    Raises:
        OSError: as `write_error`.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: Exception) -> OSError:
    """The error for a file that cannot be written; it says which, why, and how much space is free there.

    Args:
        path: the file, as the caller knows it.
        error: what was raised, for example for a full disk or a folder that cannot be written to.
    """
    cause = getattr(error, "strerror", None) or "the system took only a part of it"
    folder = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(f"{path} cannot be written ({cause}; {free:.0f} MiB are free there)")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


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
