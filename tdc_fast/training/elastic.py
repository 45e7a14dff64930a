"""What torchrun asks of a run: options that work on several processes, and going on by itself after a restart."""

from __future__ import annotations

import os
from pathlib import Path

from tdc_fast.distributed import restarted
from tdc_fast.errors import invalid
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import default_directory


def for_many_processes(config: TrainConfig, size: int) -> TrainConfig:
    """The options as several processes, or one that torchrun started again, take them.

    A run that torchrun started again (`--max-restarts`) goes on from its last checkpoint, whatever options it began
    with.

    Args:
        config: the options.
        size: number of processes.

    Raises:
        ValueError: naming an option that several processes cannot have.
    """
    if config.batch_size < size and not config.base:
        raise invalid("batch_size", config.batch_size, f"at least {size}: an image for each process in every step")
    directory = config.run_dir or (config.resume if config.resume != "latest" else "") or default_directory()
    if not directory and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
        raise invalid("run_dir", "", "--run_dir DIR, in which a run that is started again (--max-restarts) is found")
    if restarted() and (Path(directory) / "config.json").is_file():
        return config.replace(resume=directory, run_dir=directory, resume_step=-1)
    return config
