"""The run directory, which holds everything of one training run.

    config.json     every option            run.json      identity, image channels, versions
    groups.json     timestep groups         widths.json   what each expert keeps
    macs.json       measured cost of every phase
    base/           checkpoints, progress.csv, log.txt of stage 1        experts/   the same of stage 2
    tensorboard/    samples/

Plain training (no groups) has a single stage whose files lie in the run directory itself, where scripts written for
improved-diffusion look for them.
"""

from __future__ import annotations

import fcntl
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tdc_fast.atomic import remove_leftovers, write_json
from tdc_fast.errors import invalid
from tdc_fast.runs.config import TrainConfig, read_options

FORMAT = 1


class RunDirectory:
    """Paths and small files of one run; checkpoints are `tdc_fast.runs.checkpoint`'s.

    Attributes:
        path: the directory.
        config: the options that the run was made with.
        in_channels: channels of its images (the configuration may take them from the data).
    """

    def __init__(self, path: Path, config: TrainConfig, in_channels: int, logs: Path | None = None) -> None:
        self.path = path
        self.config = config
        self.in_channels = in_channels
        self._logs = logs

    def __repr__(self) -> str:
        kind = f"{self.config.groups} groups" if self.config.groups else "no groups"
        return f"<RunDirectory {self.path}: {kind}, {self.config.image_size} pixels, {self.in_channels} channels>"

    @classmethod
    def create(cls, config: TrainConfig, in_channels: int) -> RunDirectory:
        """Make the directory of a new run, named by the configuration or the environment.

        Args:
            config: the options of the run.
            in_channels: channels of its images.

        Raises:
            ValueError: another run is there.
        """
        chosen = config.run_dir or default_directory()
        path = (
            Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"tdc-fast-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}"
        )
        if (path / "config.json").exists() and _has_begun(path):
            raise invalid(
                "run_dir", str(path), f"a directory without a run; continue the one there with --resume {path}"
            )
        if (path / "progress.csv").exists() and not config.resume_checkpoint:
            raise invalid("run_dir", str(path), "a directory without another program's progress.csv")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise invalid("run_dir", str(path), f"a directory that can be made ({error.strerror})") from error
        logs = (
            os.environ.get("OPENAI_LOGDIR") if not config.run_dir and os.environ.get("DIFFUSION_BLOB_LOGDIR") else None
        )
        run = cls(path, config, in_channels, Path(logs) if logs else None)
        with _sole_writer(path):
            run.write(
                "run.json",
                {
                    "format": FORMAT,
                    "identity": config.identity,
                    "in_channels": in_channels,
                    "logs": logs,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": {"python": platform.python_version(), "torch": torch.__version__},
                    "threads": torch.get_num_threads(),
                    "machine": platform.platform(),
                    "command": sys.argv,
                },
            )
            stored = config.replace(stop_after="never")  # where this call stops does not bind the next one
            run.write("config.json", stored.to_dict())  # last: a directory with it is a run
        return run

    @classmethod
    def open(cls, path: str | Path, config: TrainConfig | None = None) -> RunDirectory:
        """The run in an existing directory.

        Args:
            path: the directory.
            config: replaces the stored options; those that may change when a run is resumed may differ.

        Raises:
            ValueError: there is no run, or its files contradict each other.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise invalid("run", str(path), "a run directory: one with a config.json")
        stored = TrainConfig.from_file(path / "config.json")
        facts = read_options(path / "run.json")
        if facts.get("identity") != stored.identity:
            raise invalid(
                "run", str(path / "config.json"), "the options the run began with; the file was changed since"
            )
        in_channels, logs = facts.get("in_channels"), facts.get("logs")
        if not isinstance(in_channels, int):
            raise invalid("run", str(path / "run.json"), "the file that the run wrote; its in_channels is no integer")
        return cls(path, config or stored, in_channels, Path(logs) if logs else None)

    @property
    def identity(self) -> str:
        """Identity of the run's configuration."""
        return self.config.identity

    def stage_directory(self, stage: str) -> Path:
        """Checkpoints of stage "base" or "experts"."""
        return self.path / stage if self.config.groups else self.path

    def log_directory(self, stage: str) -> Path:
        """progress.csv and log.txt of a stage."""
        return self._logs or self.stage_directory(stage)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the run for this process, and delete files that a killed process left half written.

        Raises:
            ValueError: another process works on it.
        """
        with _sole_writer(self.path):
            for directory in {self.path, *(self.stage_directory(stage) for stage in ("base", "experts"))}:
                remove_leftovers(directory)
            yield

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the run's JSON files atomically."""
        write_json(self.path / name, value)

    def read(self, name: str) -> dict[str, Any] | None:
        """One of the run's JSON files; None if it is not written yet."""
        return read_options(self.path / name) if (self.path / name).is_file() else None

    def description(self, stage: str, **more: Any) -> dict[str, Any]:
        """The description that every checkpoint of a stage carries.

        Args:
            stage: "base" or "experts".
            **more: further JSON values.
        """
        return {
            "stage": stage,
            "identity": self.identity,
            "in_channels": self.in_channels,
            **more,
            "config": self.config.to_dict(),
        }


@contextmanager
def _sole_writer(directory: Path) -> Iterator[None]:
    """Lock a directory; the lock ends with the process, even if it is killed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise invalid(
            "run_dir", str(directory), "a run that no other process is working on: wait for it, or stop it"
        ) from error
    except OSError:
        pass  # some network file systems lock no directories
    try:
        yield
    finally:
        os.close(descriptor)


def _has_begun(path: Path) -> bool:
    """Whether a run directory holds results; one of a run that was refused at its start does not."""
    return any(next(path.rglob(kind), None) is not None for kind in ("*.pt", "progress.csv"))


def default_directory() -> str:
    """The directory that improved-diffusion's environment variables name; empty if they are not set."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or os.environ.get("OPENAI_LOGDIR") or ""
