"""Seeding all random number generators of a stage, and their state as plain values."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed (63 bits) for one purpose of a run: equal inputs give equal seeds, different purposes independent ones.

    Args:
        seed: the run's seed.
        *purpose: what the seed is for.
    """
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, numpy and Python inside the block; their states are restored afterwards."""
    before = random_state()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        restore_random_state(before)


def random_state(shared: torch.Generator | None = None) -> dict[str, Any]:
    """State of the global generators of torch (CPU and CUDA), numpy and Python, in types that load without pickle.

    Args:
        shared: the generator that several processes draw from alike: its state stands in place of that of the default
            generators of its kind of device.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    if shared is not None and shared.device.type == "cuda":
        cuda = [shared.get_state()] * len(cuda)
    elif shared is not None:
        cpu = shared.get_state()
    return {
        "torch": cpu,
        "cuda": cuda,
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def check_random_state(state: dict[str, Any]) -> None:
    """Check on generators of its own that `restore_random_state` can restore a state.

    Raises:
        ValueError: it is not what `random_state` returned.
    """
    try:
        torch.Generator().set_state(state["torch"].cpu())
        if not all(one.dtype == torch.uint8 and one.dim() == 1 for one in state["cuda"]):
            raise ValueError("cuda")
        np.random.RandomState().set_state(_numpy_state(state))
        random.Random().setstate(_python_state(state))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"states of the random generators; {' '.join(str(error).split())}") from error


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"][: torch.cuda.device_count()]])
    np.random.set_state(_numpy_state(state))
    random.setstate(_python_state(state))


def _numpy_state(state: dict[str, Any]) -> tuple[Any, ...]:
    name, keys, position, has_gauss, gauss = state["numpy"]
    return name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss


def _python_state(state: dict[str, Any]) -> tuple[Any, ...]:
    version, internal, following = state["python"]
    return version, tuple(internal), following
