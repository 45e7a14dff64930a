"""Training, pruning and evaluation are one process: starting several of them by a launcher is refused."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tdc_fast.errors import invalid

P = ParamSpec("P")
R = TypeVar("R")

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
                name, count, f"1: work is not divided among processes yet; start one process, without {launcher}"
            )


def one_process(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that does a whole job, so that it calls `refuse_many_processes` first."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_many_processes()
        return function(*args, **kwargs)

    return checked
