"""Only training may run as several processes, under torchrun; all else refuses to be one of several."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tdc_fast.distributed.launch import NEEDED, joined, launched
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


def refuse_many_processes(*, but_by_torchrun: bool = False) -> None:
    """Refuse to run as one of several processes: each would do the whole work, in the same directory.

    Args:
        but_by_torchrun: the work is divided among the processes that torchrun starts.

    Raises:
        ValueError: naming the variable of the environment that says so.
    """
    if but_by_torchrun and launched() > 1:
        return
    for name, launcher in _LAUNCHERS.items():
        count = os.environ.get(name, "").strip()
        if count in ("", "0", "1"):
            continue
        if but_by_torchrun:
            remedy = f"1, or processes that torchrun starts, with {', '.join(NEEDED)} set"
        else:
            remedy = f"1: this work is not divided among processes; start one process, without {launcher}"
        raise invalid(name, count, remedy)


def one_process(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that does a whole job, so that it calls `refuse_many_processes` first."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_many_processes()
        return function(*args, **kwargs)

    return checked


def many_processes(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that does its job also as one of the processes that torchrun starts, which it joins."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_many_processes(but_by_torchrun=True)
        with joined():
            return function(*args, **kwargs)

    return checked
