"""Train a denoiser as improved-diffusion does, or a TDC model with --groups N: `python -m tdc_fast.train`.

From Python::

    from tdc_fast.train import TrainConfig, train

    config = TrainConfig(data_dir="digits", image_size=8, num_channels=16, groups=4, stage1_steps=500, stage2_steps=500)
    run = train(config)
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("train"))

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdc_fast.command_line import parse_flags, run_command, value_of, with_bare_value
from tdc_fast.data.latent_files import LatentIndex
from tdc_fast.distributed import world
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.runs.config import TrainConfig, read_options, refuse_changed_options
from tdc_fast.runs.directory import RunDirectory, default_directory
from tdc_fast.runs.limits import PathText
from tdc_fast.runs.opening import refuse_two_directories
from tdc_fast.runs.options import SECTIONS, RunOptions
from tdc_fast.training.messages import describe_next
from tdc_fast.training.train import train

__all__ = ["TrainConfig", "main", "train"]

_DESCRIPTION = """Train a denoiser as improved-diffusion does, or (with --groups N) a TDC model: one base for all
noise levels, split into N experts that are pruned to their budget and fine-tuned on their own timesteps."""


@dataclass(frozen=True, kw_only=True)
class _RunFlags(RunOptions):
    __doc__ = RunOptions.__doc__  # the text above the section in --help

    config: PathText = ""
    """YAML or JSON file of flag names and values; flags on the command line win."""


def parse_command_line(argv: Sequence[str]) -> TrainConfig:
    """Parse the arguments into the configuration of a run.

    Flags and values are those of improved-diffusion (`--learn_sigma True`, `--ema_rate "0.9999,0.999"`). With
    `--resume RUN` flags that are not given come from the configuration of that run.

    Args:
        argv: the arguments, without the program's name.

    Raises:
        ValueError: a value is not allowed, or contradicts the run that is resumed.
        SystemExit: `--help`, or a flag that does not exist.
    """
    arguments = with_bare_value(argv, "resume", "latest")
    file = value_of(arguments, "config")
    from_file = read_options(file) if file else {}
    directory = _resumed_directory(arguments, str(from_file.get("run_dir", "")))
    resumed = _stored_config(directory, arguments) if directory else None
    latents = value_of(arguments, "latents") or str(from_file.get("latents", ""))
    size = {"image_size": LatentIndex.load(Path(latents)).space.size} if latents else {}
    values = {**size, **(resumed.to_dict() if resumed else {}), **from_file}
    defaults = TrainConfig.from_dict(values).to_dict()  # refuses a bad key or value of the file by name
    parsed = parse_flags(
        {**SECTIONS, "run": _RunFlags},
        arguments,
        defaults=defaults,
        prog="python -m tdc_fast.train",
        description=_DESCRIPTION,
    )
    parsed.pop("config")
    config = TrainConfig.from_dict(parsed)
    if resumed is None:
        return config
    refuse_changed_options(resumed, config)
    return config.replace(run_dir=str(directory))


def _resumed_directory(arguments: Sequence[str], run_dir_of_file: str) -> Path | None:
    resume, run_dir = value_of(arguments, "resume"), value_of(arguments, "run_dir") or run_dir_of_file
    if resume != "latest":
        refuse_two_directories(resume, run_dir)
        return Path(resume) if resume else None
    directory = run_dir or default_directory()
    if not directory:
        raise invalid("--resume", "", "the run's directory after it, or --run_dir DIR")
    return Path(directory)


def _stored_config(directory: Path, arguments: Sequence[str]) -> TrainConfig | None:
    """The configuration of the run to resume; None if there is none yet and the arguments can start it."""
    path = directory / "config.json"
    if path.is_file():
        return RunDirectory.open(directory).config
    if not (value_of(arguments, "data_dir") or value_of(arguments, "latents")):
        raise invalid(
            "--resume", str(directory), "a run directory (it has a config.json), or all flags of a run to start there"
        )
    print(f"nothing to resume in {directory} yet: the run starts at step 0", file=sys.stderr)
    return None


def _train(arguments: list[str]) -> None:
    config = world().from_first(lambda: parse_command_line(arguments))
    run = train(config)
    if not world().first:
        return
    if config.stop_after == "never":
        print(f"finished: {run.path}\n{describe_next(run)}")
    else:
        print(f"stopped after {config.stop_after}: {run.path}; --resume {run.path} continues it")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_train, argv, stopped=STOPPED["train"], many_processes=True)
