"""A command is one process: starting several of them by a launcher is refused."""

from __future__ import annotations

import os

from tdc_fast.errors import invalid

_LAUNCHERS = {
    "WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Environment variables that tell a process how many there are, and what sets them."""


def refuse_many_processes() -> None:
    """Refuse to run as one of several processes: each would do the whole work, in the same directory.

    Raises:
        ValueError: naming the variable of the environment that says so.
    """
    for name, launcher in _LAUNCHERS.items():
        count = os.environ.get(name, "").strip()
        if count not in ("", "0", "1"):
            raise invalid(
                name, count, f"1: there is no distributed training yet; start one process, without {launcher}"
            )
