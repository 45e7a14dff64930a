"""The command line of training: argv -> TrainConfig."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdc_fast.errors import invalid, require
from tdc_fast.training.config import MAY_CHANGE_ON_RESUME, TrainConfig, read_options
from tdc_fast.training.options import SECTIONS

_DESCRIPTION = """Train a denoiser as improved-diffusion does, or (with --groups N) a TDC model: one base for all
noise levels, split into N experts that are pruned to their budget and fine-tuned on their own timesteps.

Values may also come from a YAML or JSON file, --config PATH; flags on the command line win."""


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
    parsed = tyro.cli(
        _command_line_type(tyro),
        args=arguments,
        default=_in_sections(tyro, defaults),
        prog="python -m tdc_fast.train",
        description=_DESCRIPTION,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    flat: dict[str, Any] = {}
    for section in SECTIONS:
        flat.update(dataclasses.asdict(getattr(parsed, section)))
    config = TrainConfig.from_dict(flat)
    if run_config is not None:
        refuse_changed_options(run_config, config)
        config = config.replace(run_dir=str(_resumed_directory(arguments)))
    return config


def refuse_changed_options(run: TrainConfig, wanted: TrainConfig) -> None:
    """ValueError naming the first option in which a resumed run would differ from what it was."""
    for name, value in wanted.to_dict().items():
        if name not in MAY_CHANGE_ON_RESUME and getattr(run, name) != value:
            raise invalid(name, value, f"{getattr(run, name)!r} as the resumed run has it; a new run may differ")


def _command_line_type(tyro: Any) -> type:
    fields = [(name, section, dataclasses.field(default_factory=section)) for name, section in SECTIONS.items()]
    return dataclasses.make_dataclass("Options", fields)


def _in_sections(tyro: Any, config: TrainConfig) -> Any:
    values = config.to_dict()
    sections = {
        name: section(**{field.name: values[field.name] for field in dataclasses.fields(section)})
        for name, section in SECTIONS.items()
    }
    return _command_line_type(tyro)(**sections)


def _normalise(argv: Sequence[str]) -> tuple[list[str], str]:
    """argv with one spelling per thing, and the value of ``--config`` taken out of it."""
    booleans = {name for name, kind in typing.get_type_hints(TrainConfig).items() if kind is bool}
    tokens: list[str] = []
    for token in argv:
        flag, equals, value = token.partition("=")
        if token.startswith("--"):
            tokens.append("--" + flag[2:].replace("-", "_"))
            if equals:
                tokens.append(value)
        else:
            tokens.append(token)
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
            result += [token, _boolean(token, str(following))]
            position += 1
        else:
            result.append(token)
    return result, config_file


def _boolean(flag: str, text: str) -> str:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return "True"
    if text.lower() in ("no", "false", "f", "n", "0"):
        return "False"
    raise invalid(flag, text, "True or False")


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    found = [arguments[i + 1] for i, token in enumerate(arguments[:-1]) if token == flag]
    return found[-1] if found else None


def _resumed_directory(arguments: Sequence[str]) -> Path | None:
    from tdc_fast.training.run import default_directory

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
