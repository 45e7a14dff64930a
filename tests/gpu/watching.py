"""Notices a GPU that does not answer any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def watched_gpu(seconds: float, hangs: Callable[[], None], broken: Callable[[RuntimeError], None]) -> Iterator[None]:
    """Waits for the GPU after the block.

    Args:
        seconds: for the block and the wait.
        hangs: called in another thread when they are over; the main thread waits in CUDA.
        broken: called with CUDA's error after the block, which every later call would meet as well.
    """
    timer = threading.Timer(seconds, hangs)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            broken(error)
        timer.cancel()
