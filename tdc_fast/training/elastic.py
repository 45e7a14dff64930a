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
    _refuse_small_batches(config.replace(**config.overrides), size)
    directory = config.run_dir or (config.resume if config.resume != "latest" else "") or default_directory()
    if not directory and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
        raise invalid("run_dir", "", "--run_dir DIR, in which a run that is started again (--max-restarts) is found")
    if restarted() and (Path(directory) / "config.json").is_file():
        return config.replace(resume=directory, run_dir=directory, resume_step=-1)
    return config


def _refuse_small_batches(config: TrainConfig, size: int) -> None:
    """ValueError where a batch has fewer images than there are processes."""
    batches = [] if config.base else [("batch_size", config.batch_size)]
    if config.groups and config.stop_after == "never":
        name = "stage2_batch" if config.stage2_batch else "batch_size"
        batches.append((name, getattr(config, name)))
    for name, batch in batches:
        if batch < size:
            raise invalid(name, batch, f"at least {size}: an image for each process in every step")
