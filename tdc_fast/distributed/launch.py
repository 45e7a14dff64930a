"""The processes that torchrun started, joined into one run."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch

from tdc_fast.distributed.connections import watched
from tdc_fast.distributed.world import World, as_world, is_of_all, losses_named, world
from tdc_fast.errors import invalid

_START = timedelta(minutes=30)
"""How long a process waits for the others at the start."""
_WAIT = timedelta(days=1)
"""How long a process waits for the others: one may search widths for hours. A process that ends is noticed at once, and
a machine that does not answer after minutes (`tdc_fast.distributed.connections`)."""
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets."""


def launched() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    count = os.environ.get("WORLD_SIZE", "").strip()
    return int(count) if count.isdecimal() and all(os.environ.get(name) for name in NEEDED) else 1


def launched_rank() -> int:
    """The number of this process among those that torchrun started; 0 without it."""
    rank = os.environ.get("RANK", "").strip()
    return int(rank) if launched() > 1 and rank.isdecimal() else 0


def first_on_machine() -> bool:
    """Whether this process is the first of its run on its machine, which checks what all of them read there."""
    return world().alone or int(os.environ["LOCAL_RANK"]) == 0


def restarted() -> bool:
    """Whether torchrun started this process again, after one of the run had failed (`--max-restarts`)."""
    return _restarts() not in ("", "0")


def _restarts() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip()


@contextmanager
def joined() -> Iterator[World]:
    """Within the block this process is one of those that torchrun started, if it did; blocks may be nested.

    Only the first process prints and warns there. They talk by gloo; gradients on a GPU are added up by NCCL.

    Raises:
        ValueError: torch has no torch.distributed, a variable of the environment is none of torchrun's, or the others
            cannot be found.
    """
    if launched() == 1 or not world().alone:
        yield world()
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise invalid("WORLD_SIZE", launched(), "1, as this torch is built without torch.distributed")
    _check_variables()
    of_ours = not dist.is_initialized()
    if of_ours:
        _find_others()
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    rank, size = dist.get_rank(), dist.get_world_size()
    this = World(rank, size, dist.group.WORLD if of_ours else _team(range(size), torch.device("cpu")), _team)
    try:
        with as_world(this), _quiet(not this.first):
            yield this
    except BaseException as error:
        if of_ours and is_of_all(error):  # not after another one, as the others may be gone
            this.leave()
            dist.destroy_process_group()
        raise
    if of_ours:
        dist.destroy_process_group()


def _check_variables() -> None:
    for name, end in (("RANK", launched()), ("LOCAL_RANK", launched()), ("MASTER_PORT", 2**16)):
        text = os.environ[name].strip()
        if not text.isdecimal() or int(text) >= end:
            raise invalid(name, text, f"a number below {end}, as torchrun sets it")


def _find_others() -> None:
    """Make the default process group."""
    import torch.distributed as dist

    try:
        store, rank, size = _store()
        # A prefix of its own: what was written when processes were joined before is still there, also by those that
        # torchrun has replaced.
        prefixed = dist.PrefixStore(f"tdc_fast/{_restarts()}/{next(_joins)}", store)
        with watched():
            dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size, timeout=_WAIT)
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        minutes = _START // timedelta(minutes=1)
        remedy = f"where the {launched()} processes of the run find each other within {minutes} minutes"
        reason = str(error).strip().partition("\n")[0][:200]
        raise invalid("MASTER_ADDR, MASTER_PORT", address, f"{remedy} ({reason})") from error


@functools.cache
def _store() -> tuple[Any, int, int]:
    """What the processes find each other by, the number of this one, and how many there are; one for all joinings."""
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://", timeout=_START)))


_joins = itertools.count()


def refuse_device(name: str, device: torch.device) -> None:
    """Refuse a device that several processes cannot share out.

    Args:
        name: as given.
        device: the device that it means.

    Raises:
        ValueError: naming --device or torchrun's --nproc_per_node.
    """
    if world().alone or device.type != "cuda":
        return
    if device.index is not None:
        raise invalid("device", name, "cuda or auto: each process takes the GPU of its own number on its machine")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise invalid("nproc_per_node", here, f"at most {gpus}, the GPUs of this machine; or --device cpu")


def _team(ranks: Sequence[int], device: torch.device) -> Any:
    import torch.distributed as dist

    with losses_named():
        if device.type == "cuda":
            return dist.new_group(list(ranks), backend="nccl")
        with watched():
            return dist.new_group(list(ranks), backend="gloo", timeout=_WAIT)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Print and warn nothing in the block."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        sys.stdout.flush()
