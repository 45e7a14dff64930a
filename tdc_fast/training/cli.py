"""The command line of training: argv -> TrainConfig."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdc_fast.errors import invalid, require
from tdc_fast.flags import boolean_word, split_tokens
from tdc_fast.runs.config import TrainConfig, read_options, refuse_changed_options
from tdc_fast.runs.options import SECTIONS, help_texts

_DESCRIPTION = """Train a denoiser as improved-diffusion does, or (with --groups N) a TDC model: one base for all
noise levels, split into N experts that are pruned to their budget and fine-tuned on their own timesteps."""


def parse_command_line(argv: Sequence[str]) -> TrainConfig:
    """The configuration of a command line.

    Flags, values and spelling are improved-diffusion's (``--learn_sigma True``, ``--ema_rate "0.9999,0.999"``);
    dashes and underscores are the same, booleans accept what improved-diffusion accepts. With ``--resume RUN`` the
    run's own configuration supplies every flag that is not given.

    Raises:
        ValueError: a value is impossible, or contradicts the run that is resumed.
        SystemExit: ``--help``, or a flag that does not exist (tyro prints the nearest ones).
    """
    tyro = require("tyro", extra="demo")
    arguments, config_file = _normalise(argv)
    values = read_options(config_file) if config_file else {}
    run_config = _config_of_resumed_run(arguments)
    if run_config is not None:
        values = {**run_config.to_dict(), **values}
    defaults = TrainConfig.from_dict(values)
    kind = _command_line_type(tyro)
    parsed = tyro.cli(
        kind,
        args=arguments,
        default=_in_sections(kind, defaults),
        prog="python -m tdc_fast.train",
        description=_DESCRIPTION,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    config = TrainConfig.from_dict(
        {
            field.name: getattr(getattr(parsed, name), field.name)
            for name, section in SECTIONS.items()
            for field in dataclasses.fields(section)
        }
    )
    if run_config is not None:
        refuse_changed_options(run_config, config)
        config = config.replace(run_dir=str(_resumed_directory(arguments)))
    return config


def _command_line_type(tyro: Any) -> type:
    """A dataclass of the sections, each field with its help text, and --config for the help's sake."""
    fields: list[Any] = []
    for name, section in SECTIONS.items():
        kinds, texts = typing.get_type_hints(section), help_texts(section)
        options: list[Any] = [
            (field.name, typing.Annotated[kinds[field.name], tyro.conf.arg(help=texts[field.name])], field)
            for field in dataclasses.fields(section)
        ]
        if name == "run":
            about = "YAML or JSON file of flag names and values; flags on the command line win."
            options.insert(
                0, ("config", typing.Annotated[str, tyro.conf.arg(help=about)], dataclasses.field(default=""))
            )
        options = [(key, kind, dataclasses.field(default=field.default)) for key, kind, field in options]
        kind = dataclasses.make_dataclass(name.capitalize(), options, namespace={"__doc__": section.__doc__})
        fields.append((name, kind, dataclasses.field(default_factory=kind)))
    return dataclasses.make_dataclass("Options", fields)


def _in_sections(kind: type, config: TrainConfig) -> Any:
    """The configuration's values as an instance of the command line's type."""
    values = config.to_dict()
    sections = {}
    for name, section in SECTIONS.items():
        part = getattr(kind(), name)
        own = {field.name: values[field.name] for field in dataclasses.fields(section)}
        sections[name] = dataclasses.replace(part, **own)
    return kind(**sections)


def _normalise(argv: Sequence[str]) -> tuple[list[str], str]:
    """argv with one spelling per thing, and the value of ``--config`` taken out of it."""
    booleans = {name for name, kind in typing.get_type_hints(TrainConfig).items() if kind is bool}
    tokens = split_tokens(argv)
    result: list[str] = []
    config_file = ""
    position = 0
    while position < len(tokens):
        token = tokens[position]
        following = tokens[position + 1] if position + 1 < len(tokens) else None
        has_value = following is not None and not following.startswith("--")
        position += 1
        if token == "--config":
            if following is None or not has_value:
                raise invalid("--config", "", "a path of a .yaml or .json file after it")
            config_file = following
            position += 1
        elif token == "--resume" and not has_value:
            result += [token, "latest"]
        elif token[2:] in booleans and has_value:
            result += [token, boolean_word(token, str(following))]
            position += 1
        else:
            result.append(token)
    return result, config_file


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    found = [arguments[i + 1] for i, token in enumerate(arguments[:-1]) if token == flag]
    return found[-1] if found else None


def _resumed_directory(arguments: Sequence[str]) -> Path | None:
    from tdc_fast.runs.directory import default_directory

    resume = _value_of(arguments, "--resume")
    if resume is None:
        return None
    if resume != "latest":
        return Path(resume)
    directory = _value_of(arguments, "--run_dir") or default_directory()
    if not directory:
        raise invalid("--resume", "", "the run's directory after it, or --run_dir DIR")
    return Path(directory)


def _config_of_resumed_run(arguments: Sequence[str]) -> TrainConfig | None:
    directory = _resumed_directory(arguments)
    if directory is None:
        return None
    path = directory / "config.json"
    if path.is_file():
        return TrainConfig.from_dict(read_options(path))
    if _value_of(arguments, "--data_dir") is None:
        raise invalid(
            "--resume", str(directory), "a run directory (it has a config.json), or all flags of a run to begin there"
        )
    print(f"nothing to resume in {directory} yet: the run begins at step 0", file=sys.stderr)
    return None
