"""What all command lines share: flags in improved-diffusion's syntax (`--use_ddim True`), and how a command ends."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import signal
import sys
import tempfile
import threading
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tdc_fast.distributed import LostProcess, is_of_all, joined, launched_rank
from tdc_fast.entry import INTERRUPTED
from tdc_fast.errors import invalid, is_out_of_memory
from tdc_fast.runs.config import NO_SUPER_RESOLUTION, SUPER_RESOLUTION
from tdc_fast.runs.denoisers import TrainedDenoiser, from_checkpoint, from_run, refuse_mismatch, stored_facts
from tdc_fast.runs.directory import default_directory
from tdc_fast.runs.limits import check_limits, check_path
from tdc_fast.runs.options import DiffusionOptions, ModelOptions
from tdc_fast.runs.processes import refuse_many_processes
from tdc_fast.runs.weights import read_description

BASIC = frozenset(
    {
        *("run", "which", "model_path", "num_samples", "sampler", "steps", "classes", "features", "out", "config"),
        *("data_dir", "heldout", "image_size", "num_channels", "num_res_blocks", "class_cond", "diffusion_steps"),
        *("noise_schedule", "learn_sigma", "batch_size", "lr", "lr_anneal_steps", "ema_ramp", "groups", "grouping"),
        *("k", "base", "stage1_steps", "stage2_steps", "agent", "rounds", "run_dir", "resume", "device", "preview"),
        *("host", "port", "max_batch"),
    }
)
"""The flags that `-h` shows; `--help` shows all."""
NOT_SHOWN_BY_WEIGHTS = (
    *("diffusion_steps", "noise_schedule", "rescale_timesteps", "predict_xstart", "predict_v"),
    *("sigma_small", "num_heads", "num_heads_upsample"),
)
"""The flags that neither names nor shapes of weights contradict."""
_OUT_OF_MEMORY = (
    "out of memory ({}); lower --batch_size (in training also --microbatch, in a search also --score_samples), or take "
    "a smaller network or smaller images: --num_channels, --image_size"
)
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def run_command(
    command: Callable[[list[str]], None], argv: Sequence[str] | None, *, stopped: str, many_processes: bool = False
) -> int:
    """Run a command and return its exit status: 0, 2 when it refuses or fails, 130 after Ctrl-C.

    Args:
        command: parses its arguments, does the work and prints the result.
        argv: the arguments; None takes those of the process.
        stopped: what to print after Ctrl-C, unless the interrupt has its own message.
        many_processes: it also runs as one of the processes that torchrun starts. An error of all of them is printed
            once; one that a process has alone, by that one.
    """
    _print_any_text()
    try:
        refuse_many_processes(but_by_torchrun=many_processes)
        with _plain_warnings(), _termination_as_interrupt(), joined():
            command(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        _print_error(error)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error) or "Python's allocator failed").splitlines()[0][:160]
        print(f"error: {_OUT_OF_MEMORY.format(what)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        if launched_rank() == 0:
            print(str(interrupt) or stopped, file=sys.stderr)
        return INTERRUPTED
    return 0


def _print_any_text() -> None:
    """Let no command fail because a name, of a file perhaps, has characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_error(error: Exception) -> None:
    rank = launched_rank()
    if rank == 0 or not (is_of_all(error) or isinstance(error, LostProcess)):
        print(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, in the main thread, where Python allows handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show the package's own warnings as `warning: ...`, without the source line that raised them."""
    format_as_usual = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
            return f"warning: {message}\n"
        return format_as_usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = format_as_usual


def parse_flags(
    sections: Mapping[str, type],
    argv: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    prog: str,
    description: str,
) -> dict[str, Any]:
    """Parse a command line into the values of all flags, by name.

    Dashes and underscores in a flag's name are the same, `--flag=value` works, booleans are values. `-h` explains the
    most used flags, `--help` all.

    Args:
        sections: heading in `--help` -> frozen dataclass whose fields are the flags and whose field docstrings are
            their help.
        argv: the arguments.
        defaults: values that replace the dataclasses' own defaults; names that are no flag are ignored.
        prog: the command's name in `--help`.
        description: what the command does, for `--help`.

    Raises:
        ValueError: a flag or value does not exist, a boolean flag has another value, or a number is out of the range
            that its section declares.
        SystemExit: after `--help`, with status 0.
    """
    import tyro

    for token, value in _pairs(argv):
        if token[2:] in SUPER_RESOLUTION:
            raise invalid(token, value, NO_SUPER_RESOLUTION)
    is_short = "-h" in argv
    if is_short:
        description += "\n\nThe most used flags; --help explains all of them."
    fields = []
    for name, section in sections.items():
        kind = _flag_class(tyro, section, defaults, hidden=is_short)
        fields.append((name, kind, dataclasses.field(default_factory=kind)))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Any = tyro.cli(
                dataclasses.make_dataclass("Flags", fields),
                args=_with_boolean_words(argv, sections),
                prog=prog,
                description=description,
                use_underscores=True,
                # Without comments, for which tyro would read the sources of modules: `_flag_class` gives every text.
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as usage:
        if usage.code:
            raise ValueError(f"{_in_one_line(said.getvalue())}; {prog} --help explains all flags") from None
        raise
    values: dict[str, Any] = {}
    for name in sections:
        values.update(dataclasses.asdict(getattr(parsed, name)))
    for section in sections.values():
        check_limits(section, values)
    return values


def _in_one_line(box: str) -> str:
    """What tyro says in a frame of several parts: its first part, and the names of the flags that it suggests."""
    parts: list[list[str]] = [[]]  # the first one is the title, where the frame is of ASCII
    for line in box.splitlines():
        if line.startswith(("╭", "╰")) or line[1:].lstrip().startswith(("───", "---")):
            parts.append([])
        else:
            parts[-1].append(line[2:].rstrip("│ "))
    first, *others = [rows for rows in parts[1:] if any(rows)] or [[box]]
    said = " ".join(row.strip() for row in first).removeprefix("Error parsing ").rstrip(".")
    flags = [row.split()[0] for rows in others for row in rows if row.startswith("    --")]
    suggested = others and others[0][0].startswith("Perhaps you meant")
    return said[0].lower() + said[1:] + (f"; perhaps you meant {' or '.join(flags)}" if suggested else "")


def value_of(argv: Sequence[str], flag: str) -> str:
    """The value of a flag with a path that must be known before the rest is parsed; "" where it is not given.

    Raises:
        ValueError: no value follows the flag, or one that cannot be a path.
    """
    value = ""
    for token, following in _pairs(argv):
        if token == f"--{flag}":
            if following.startswith("--"):
                raise invalid(token, "", "a value after it")
            check_path(flag, following)
            value = following
    return value


def split_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate what a command names without a flag from the flags, of which each but --help takes one value.

    Returns:
        The names, and the flags with their values.
    """
    names: list[str] = []
    flags: list[str] = []
    wants_value = False
    for token in arguments:
        if wants_value or token.startswith("-"):
            flags.append(token)
            wants_value = token.startswith("--") and "=" not in token and token != "--help" and not wants_value
        else:
            names.append(token)
    return names, flags


def with_bare_value(argv: Sequence[str], flag: str, value: str) -> list[str]:
    """The arguments, where a flag that no value follows gets this one."""
    tokens: list[str] = []
    for token, following in _pairs(argv):
        tokens.append(token)
        if token == f"--{flag}" and following.startswith("--"):
            tokens.append(value)
    return tokens


def parse_denoiser_flags(
    title: str, options: type, argv: Sequence[str], *, prog: str, description: str
) -> dict[str, Any]:
    """Parse the flags of a command about a trained denoiser, which `--run` or `--model_path` names.

    Args:
        title: heading of the command's own flags in `--help`.
        options: dataclass of these flags, with fields `run` and `model_path`.
        argv: the arguments.
        prog: as in `parse_flags`.
        description: as in `parse_flags`.

    Returns:
        The values of the command's flags and of those of model and diffusion; what the denoiser was trained with takes
        the place of the defaults.

    Raises:
        ValueError: not exactly one of both is given, or a flag contradicts what the denoiser was trained with.
    """
    run, model_path = value_of(argv, "run"), value_of(argv, "model_path")
    stored = stored_facts(run=run, model_path=model_path) if run or model_path else {}
    values = parse_flags(
        {title: options, "model": ModelOptions, "diffusion": DiffusionOptions},
        argv,
        defaults=stored,
        prog=prog,
        description=description,
    )
    if run and model_path:
        raise invalid("model_path", model_path, f"none together with --run {run}: one of them names the model")
    if not (run or model_path):
        raise ValueError("no model is named; give either --run DIR or --model_path FILE")
    refuse_mismatch(run or model_path, stored, values)
    return values


def load_denoiser(values: Mapping[str, Any]) -> TrainedDenoiser:
    """The denoiser that the flags of `parse_denoiser_flags` name."""
    if values["run"]:
        return from_run(values["run"], values["which"], values["timestep_respacing"])
    denoiser = from_checkpoint(values["model_path"], values)
    if read_description(Path(values["model_path"])) is None:
        flags = " ".join(f"--{name} {values[name]}" for name in NOT_SHOWN_BY_WEIGHTS)
        risk = f"A wrong value of these gives wrong results without an error: {flags}"
        print(f"note: {values['model_path']} does not record how it was trained. {risk}", file=sys.stderr)
    return denoiser


def output_directory(values: Mapping[str, Any], name: str) -> Path:
    """The folder for a command's files: `--out`, else a folder of this name in the run, else a default one.

    It is not made yet, so that a command that is refused or stopped leaves no empty folder.

    Raises:
        ValueError: nothing can be written there.
    """
    chosen = values["out"] or (values["run"] and os.path.join(values["run"], name)) or default_directory()
    directory = Path(
        chosen or os.path.join(tempfile.gettempdir(), f"tdc-fast-{name}-{datetime.now():%Y-%m-%d-%H-%M-%S-%f}")
    )
    check_writable(directory)
    return directory


def check_writable(directory: Path) -> None:
    """Refuse a folder in which no file can be made, before hours of work.

    Raises:
        ValueError: it or the nearest existing folder above it is a file or not writable.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise invalid("out", str(directory), f"a folder; {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise invalid("out", str(directory), f"a folder that can be written to; {existing} cannot")


def use_threads(count: int) -> None:
    """Set the number of CPU threads of torch; 0 leaves it as it is.

    Raises:
        ValueError: the count is negative.
    """
    if count < 0:
        raise invalid("num_threads", count, "0 or a positive number")
    if count:
        torch.set_num_threads(count)


def _split_tokens(argv: Sequence[str]) -> list[str]:
    """The arguments with underscores in the names of flags, and `--flag=value` as two."""
    tokens: list[str] = []
    for token in argv:
        flag, equals, value = token.partition("=")
        if not token.startswith("--"):
            tokens.append(token)
            continue
        tokens.append("--" + flag[2:].replace("-", "_"))
        if equals:
            tokens.append(value)
    return tokens


def _pairs(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Each argument and the one after it; "--" after the last."""
    return list(itertools.pairwise([*_split_tokens(argv), "--"]))


def _flag_class(tyro: Any, section: type, defaults: Mapping[str, Any], *, hidden: bool) -> type:
    """The section with other defaults, and help texts without the line breaks of the source, which tyro would keep.

    With `hidden`, the help leaves out flags that are not in `BASIC`; a section without any of those is shown whole.
    """
    kinds, texts = typing.get_type_hints(section), _help_texts(section)
    names = {field.name for field in dataclasses.fields(section)}
    shown = names & BASIC if hidden and names & BASIC else names

    def annotated(name: str) -> Any:
        kind: Any = typing.Annotated[kinds[name], tyro.conf.arg(help=texts.get(name))]
        return kind if name in shown else tyro.conf.Suppress[kind]

    fields: list[Any] = [
        (
            field.name,
            annotated(field.name),
            dataclasses.field(default=defaults.get(field.name, field.default)),
        )
        for field in dataclasses.fields(section)
    ]
    return dataclasses.make_dataclass(section.__name__, fields, namespace={"__doc__": section.__doc__})


@functools.cache
def _help_texts(section: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, on one line."""
    texts = {}
    for kind in filter(dataclasses.is_dataclass, reversed(section.__mro__)):
        body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def _with_boolean_words(argv: Sequence[str], sections: Mapping[str, type]) -> list[str]:
    """The arguments with True or False for any of improved-diffusion's spellings of them."""
    hints = [hint for kind in sections.values() for hint in typing.get_type_hints(kind).items()]
    booleans = {name for name, hint in hints if hint in (bool, bool | None)}
    tokens = _split_tokens(argv)
    for position in range(1, len(tokens)):
        flag, text = tokens[position - 1], tokens[position]
        if flag.startswith("--") and flag[2:] in booleans and not text.startswith("--"):
            if text.lower() not in _TRUE + _FALSE:
                raise invalid(flag, text, "True or False")
            tokens[position] = str(text.lower() in _TRUE)
    return tokens
