"""Opening the run directory of a configuration: a new one, or one that is continued."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tdc_fast.errors import invalid
from tdc_fast.runs.checkpoint import step_of
from tdc_fast.runs.config import TrainConfig, refuse_changed_options
from tdc_fast.runs.directory import RunDirectory, default_directory
from tdc_fast.runs.groups import build_groups


def open_run(config: TrainConfig, in_channels: int) -> RunDirectory:
    """The run directory of a configuration: a new one, or with `config.resume` the one that is continued.

    Args:
        config: the configuration.
        in_channels: channels of the images.

    Raises:
        ValueError: the directory holds another run, or nothing that could be resumed; or two directories are named.
    """
    refuse_two_directories(config.resume, config.run_dir)
    config = _continued_in_place(config)
    if not config.resume:
        run = RunDirectory.create(config, in_channels)
    else:
        path = Path(config.resume if config.resume != "latest" else config.run_dir or default_directory() or "")
        if config.resume == "latest" and not (config.run_dir or default_directory()):
            raise invalid("resume", config.resume, "a run directory, or --run_dir as well")
        if (path / "config.json").is_file():
            refuse_changed_options(RunDirectory.open(path).config, config)
            run = RunDirectory.open(path, config)
            if run.in_channels != in_channels:
                raise invalid("data_dir", config.data_dir, f"images of {run.in_channels} channels, as the run had")
        else:
            run = RunDirectory.create(config.replace(run_dir=str(path)), in_channels)
    threads = (run.read("run.json") or {}).get("threads")
    if threads != torch.get_num_threads():
        print(
            f"note: the run began with {threads} threads and continues with {torch.get_num_threads()}: "
            "the last bits may differ",
            file=sys.stderr,
        )
    groups = build_groups(config, report=True)
    if groups is not None:
        groups.save(run.path / "groups.json")
    return run


def refuse_two_directories(resume: str, run_dir: str) -> None:
    """Refuse a --run_dir that is not the run to resume.

    Args:
        resume: the run to resume; "" for none, "latest" for the one in `run_dir`.
        run_dir: the directory given as that of the run; "" for none.

    Raises:
        ValueError: naming run_dir.
    """
    if resume not in ("", "latest") and run_dir and Path(run_dir).resolve() != Path(resume).resolve():
        raise invalid("run_dir", run_dir, f"none together with --resume {resume}, which is the run directory")


def _continued_in_place(config: TrainConfig) -> TrainConfig:
    """Turn a --resume_checkpoint in the run's own directory into --resume and --resume_step.

    improved-diffusion resumes in the directory of --resume_checkpoint; if one of our runs is there, it is resumed.
    """
    directory = Path(config.run_dir or default_directory() or "")
    checkpoint = Path(config.resume_checkpoint)
    if config.resume or not config.resume_checkpoint or not (directory / "config.json").is_file():
        return config
    if checkpoint.parent.resolve() != directory.resolve():
        return config
    began_with = RunDirectory.open(directory).config.resume_checkpoint
    return config.replace(resume=str(directory), resume_step=step_of(checkpoint), resume_checkpoint=began_with)
