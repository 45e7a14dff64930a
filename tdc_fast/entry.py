"""Where every command begins: Ctrl-C and SIGTERM end it with one line, also while its imports load for seconds.

`python -m tdc_fast.train` and `tdc-train` come here first, so nothing may be imported here that takes time.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""Exit status after Ctrl-C and SIGTERM."""

STOPPED = {
    "train": "stopped before the run began",
    "prune": "stopped; the same command continues from memory.jsonl",
    "sample": "stopped; nothing was written",
    "serve": "stopped before anything was served",
    "nll": "stopped; nothing was written",
    "evaluate": "stopped; nothing was written",
    "encode": "stopped; the same command continues with the first file that is not whole",
    "latency": "stopped; nothing was written",
    "convert": "stopped; nothing was written",
    "merge": "stopped; nothing was written",
    "demo": "stopped; the same command continues where it was",
}
"""What each command says after Ctrl-C, unless it knows more."""


def start(command: str) -> int:
    """Import a command and run it with the arguments of the process.

    Args:
        command: a key of `STOPPED`.

    Returns:
        The exit status.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        # An exception here could be swallowed or renamed by whatever is being imported. Nothing has begun yet.
        os.write(2, f"{STOPPED[command]}\n".encode())
        os._exit(INTERRUPTED)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    for number in numbers:
        signal.signal(number, stop)
    main = importlib.import_module(f"tdc_fast.{command}").main
    try:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
        return int(main())
    except KeyboardInterrupt:  # before main could take over
        print(STOPPED[command], file=sys.stderr)
        return INTERRUPTED


train = functools.partial(start, "train")
prune = functools.partial(start, "prune")
sample = functools.partial(start, "sample")
serve = functools.partial(start, "serve")
nll = functools.partial(start, "nll")
evaluate = functools.partial(start, "evaluate")
encode = functools.partial(start, "encode")
latency = functools.partial(start, "latency")
convert = functools.partial(start, "convert")
merge = functools.partial(start, "merge")
demo = functools.partial(start, "demo")
