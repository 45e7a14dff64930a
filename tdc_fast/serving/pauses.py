"""Short pauses for garbage collection: what is there before the first request is never searched again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_pauses() -> Iterator[None]:
    """Within the block, Python's garbage collector leaves out the objects that exist when it is entered.

    A full collection holds every thread up. With torch loaded there are some 200000 objects to search, which takes more
    than 100 ms: as long as 20 steps of a small network, for all requests that are live. What comes later is collected
    as ever. It concerns the whole process, so programs enter it, and `Engine` does not.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
