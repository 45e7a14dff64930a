"""The run directory, which holds everything of one training run.

    config.json     every option            run.json      identity, channels, classes, versions, overrides
    groups.json     timestep groups         widths.json   what each expert keeps
    macs.json       measured cost of every phase
    base/           checkpoints, progress.csv, log.txt of stage 1        experts/   the same of stage 2
    tensorboard/    samples/

Plain training (no groups) has a single stage whose files lie in the run directory itself, where scripts written for
improved-diffusion look for them.
"""

from __future__ import annotations

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
from tdc_fast.data.latents import LatentFacts
from tdc_fast.errors import brief, invalid
from tdc_fast.runs.config import MAY_BE_OVERRIDDEN, TrainConfig
from tdc_fast.runs.lock import sole_writer
from tdc_fast.text_files import read_record

FORMAT = 1


class RunDirectory:
    """Paths and small files of one run; checkpoints are `tdc_fast.runs.checkpoint`'s.

    Args:
        path: the directory.
        config: the options that the run was made with.
        facts: the content of its run.json.

    Attributes:
        path: the directory.
        config: the options that the run was made with.
        in_channels: channels of its images (the configuration may take them from the data).
        classes: the classes that its training images have; None if it is unconditional, or older than this record.
        class_counts: how many training images have each of them; None likewise.
        latents: the space of its latents, and what was trained on; None for a run on images.
        split: digest of which images are trained on, where others are held out; None otherwise, or in older runs.
        identity: identity of the configuration that the run began with, which its checkpoints carry.
        overridden: names of the options that were changed since.
    """

    def __init__(self, path: Path, config: TrainConfig, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config
        self.in_channels: int = facts["in_channels"]
        self.classes: list[int] | None = facts.get("classes")
        self.class_counts: list[int] | None = facts.get("class_counts")
        self.latents: LatentFacts | None = LatentFacts.from_dict(facts.get("latents"), "run", str(path / "run.json"))
        self.split: str | None = facts.get("split")
        self.identity: str = facts["identity"]
        self.overridden = {name for entry in facts.get("overrides", []) for name in entry["changes"]}
        self._logs = Path(facts["logs"]) if facts.get("logs") else None

    def __repr__(self) -> str:
        kind = f"{self.config.groups} groups" if self.config.groups else "no groups"
        return f"<RunDirectory {self.path}: {kind}, {self.config.image_size} pixels, {self.in_channels} channels>"

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        in_channels: int,
        class_counts: Mapping[int, int] | None = None,
        latents: LatentFacts | None = None,
        split: str | None = None,
    ) -> RunDirectory:
        """Make the directory of a new run, named by the configuration or the environment.

        Args:
            config: the options of the run.
            in_channels: channels of its images.
            class_counts: how many training images have each class that occurs in them, by ascending class; None for
                an unconditional run.
            latents: what it must know of its latents; None for a run on images.
            split: digest of which images are trained on, where others are held out.

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
        logs = (
            os.environ.get("OPENAI_LOGDIR") if not config.run_dir and os.environ.get("DIFFUSION_BLOB_LOGDIR") else None
        )
        _refuse_files_of_others(path, Path(logs or path), continues=bool(config.resume_checkpoint))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise invalid("run_dir", str(path), f"a directory that can be made ({error.strerror})") from error
        facts = {
            "format": FORMAT,
            "identity": config.identity,
            "in_channels": in_channels,
            "classes": None if class_counts is None else list(class_counts),
            "class_counts": None if class_counts is None else list(class_counts.values()),
            "latents": None if latents is None else latents.to_dict(),
            "split": split,
            "logs": logs and os.path.abspath(logs),  # the run may be continued from another working directory
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "machine": platform.platform(),
            "command": sys.argv,
        }
        run = cls(path, config, facts)
        with sole_writer(path):
            run.write("run.json", facts)
            stored = config.replace(stop_after="never", override="")  # of this call; the next one may differ
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
        # Runs older than --ema_ramp have plain averages.
        options = {"ema_ramp": False, **read_record(path / "config.json")}
        try:
            stored = TrainConfig.from_dict(options)
        except ValueError as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from error
        facts = read_record(path / "run.json")
        if facts.get("identity") != stored.identity:
            raise invalid(
                "run", str(path / "config.json"), "the options the run began with; the file was changed since"
            )
        if not isinstance(facts.get("in_channels"), int):
            remedy = f"the file that the run wrote; in_channels is {facts.get('in_channels')!r}"
            raise invalid("run", str(path / "run.json"), remedy)
        _check_facts(path / "run.json", facts)
        changes = {name: value for entry in facts.get("overrides", []) for name, value in entry["changes"].items()}
        return cls(path, config or stored.replace(**changes), facts)

    def record_override(self, step: int, stage: str, before: TrainConfig, changes: Mapping[str, Any]) -> None:
        """Write changed options into run.json.

        Args:
            step: the checkpoint from which the run goes on with them.
            stage: its stage.
            before: the options that held until then.
            changes: the new values by name.
        """
        facts = read_record(self.path / "run.json")
        entry = {
            "stage": stage,
            "step": step,
            "changes": dict(changes),
            "before": {name: getattr(before, name) for name in changes},
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
        }
        self.write("run.json", {**facts, "overrides": [*facts.get("overrides", []), entry]})
        self.overridden |= set(changes)

    def stage_directory(self, stage: str) -> Path:
        """Checkpoints of stage "base" or "experts"."""
        return self.path / stage if self.config.groups else self.path

    def log_directory(self, stage: str) -> Path:
        """progress.csv and log.txt of a stage."""
        if self._logs is None:
            return self.stage_directory(stage)
        return self._logs / stage if self.config.groups else self._logs

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the run for this process, and delete files that a killed process left half written.

        Raises:
            ValueError: another process works on it.
        """
        with sole_writer(self.path):
            for directory in {self.path, *(self.stage_directory(stage) for stage in ("base", "experts"))}:
                remove_leftovers(directory)
            yield

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the run's JSON files atomically."""
        write_json(self.path / name, value)

    def read(self, name: str) -> dict[str, Any] | None:
        """One of the run's JSON files; None if it is not written yet."""
        return read_record(self.path / name) if (self.path / name).is_file() else None

    def description(self, stage: str, **more: Any) -> dict[str, Any]:
        """The description that every checkpoint of a stage carries.

        Args:
            stage: "base" or "experts".
            **more: further JSON values.
        """
        counts = {} if self.class_counts is None else {"class_counts": self.class_counts}  # older runs have none
        return {
            "stage": stage,
            "identity": self.identity,
            "in_channels": self.in_channels,
            "classes": self.classes,
            **counts,
            "latents": None if self.latents is None else self.latents.to_dict(),
            **more,
            "config": self.config.to_dict(),
        }


def _check_facts(path: Path, facts: Mapping[str, Any]) -> None:
    classes, overrides = facts.get("classes"), facts.get("overrides", [])
    if classes is not None and not (isinstance(classes, list) and all(type(value) is int for value in classes)):
        raise invalid("run", str(path), f"the file that the run wrote; classes is {brief(classes)}")
    counts = facts.get("class_counts")
    if counts is not None and not _are_counts(counts, classes):
        raise invalid("run", str(path), f"the file that the run wrote; class_counts is {brief(counts)}")
    if not isinstance(overrides, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("changes"), dict)
        and entry["changes"].keys() <= MAY_BE_OVERRIDDEN
        for entry in overrides
    ):
        raise invalid("run", str(path), f"the file that the run wrote; overrides is {brief(overrides)}")


def _are_counts(counts: Any, classes: list[int] | None) -> bool:
    if not isinstance(counts, list) or len(counts) != len(classes or ()):
        return False
    return all(type(count) is int and count > 0 for count in counts)


def _refuse_files_of_others(path: Path, logs: Path, continues: bool) -> None:
    """Refuse directories with files of the names of a run's, which a new run would replace.

    Args:
        path: the directory of the new run.
        logs: where its logs go.
        continues: it continues another one's checkpoint, and with it the log that is there.

    Raises:
        ValueError: naming the file.
    """
    if (path / "config.json").exists() and not (path / "run.json").exists():
        raise invalid("run_dir", str(path), "a directory without another program's config.json")
    for name in () if continues else ("progress.csv", "progress.json"):
        for folder, argument in {logs: "OPENAI_LOGDIR", path: "run_dir"}.items():
            if (folder / name).exists():
                raise invalid(argument, str(folder), f"a directory without another program's {name}")


def _has_begun(path: Path) -> bool:
    """Whether a run directory holds results; one of a run that was refused at its start does not."""
    return any(next(path.rglob(kind), None) is not None for kind in ("*.pt", "progress.csv"))


def default_directory() -> str:
    """The directory that improved-diffusion's environment variables name; empty if they are not set."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or os.environ.get("OPENAI_LOGDIR") or ""
