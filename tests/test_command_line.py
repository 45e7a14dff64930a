"""What command lines share: flags in improved-diffusion's syntax, and how a command ends."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tdc_fast.command_line import parse_flags, run_command, value_of, with_bare_value
from tdc_fast.entry import STOPPED

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class First:
    """Some."""

    use_ddim: bool = False
    """A switch."""
    batch_size: int = 4
    """A number."""


@dataclass(frozen=True)
class Second:
    """Others."""

    name: str = "x"
    """A text."""


def _parse(*argv: str, **defaults):
    return parse_flags({"one": First, "two": Second}, argv, defaults=defaults, prog="p", description="d")


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "y", "t"])
def test_booleans_are_values(text):
    assert _parse("--use_ddim", text)["use_ddim"] is True


def test_dashes_underscores_and_equal_signs_are_one_syntax():
    wanted = {"use_ddim": False, "batch_size": 7, "name": "x=y"}
    assert _parse("--batch-size=7", "--name", "x=y") == wanted
    assert _parse("--batch_size", "7", "--name=x=y") == wanted


def test_given_defaults_replace_those_of_the_dataclass_and_unknown_ones_are_left_out():
    assert _parse("--name", "z", batch_size=9, unrelated=1) == {"use_ddim": False, "batch_size": 9, "name": "z"}


def test_a_word_that_is_no_boolean_is_refused_by_flag():
    with pytest.raises(ValueError, match="--use_ddim: got 'maybe'"):
        _parse("--use_ddim", "maybe")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_unknown_flags_and_values_are_refused_in_one_line(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for argv, said in [
        (["--no_such", "1"], "--no_such, 1"),
        (["--nam", "z"], "--nam, z; perhaps you meant --name"),
        (["--batch_size", "x"], "--batch_size"),
    ]:
        with pytest.raises(ValueError, match=said) as refused:
            _parse(*argv)
        assert str(refused.value).endswith("--help explains all flags")
        assert "\n" not in str(refused.value) and not set("─│╭╰|+") & set(str(refused.value))
        assert " -" not in str(refused.value).replace(" --", "") and "---" not in str(refused.value)


def test_flags_for_super_resolution_are_told_apart_from_typing_errors():
    with pytest.raises(ValueError, match="--large_size: got '256'; expected no such flag: super-resolution is not"):
        _parse("--name", "large_size", "--large-size", "256")


def test_a_value_can_be_read_before_the_rest_is_parsed():
    assert value_of(["--a", "1", "--model-path", "f.pt"], "model_path") == "f.pt"
    assert value_of(["--model_path=f.pt"], "model_path") == "f.pt"
    assert value_of(["--a", "1"], "model_path") == value_of([], "model_path") == ""
    with pytest.raises(ValueError, match="--model_path: got ''; expected a value"):
        value_of(["--model_path", "--a", "1"], "model_path")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], []),
        (["--resume"], ["--resume", "latest"]),
        (["--resume", "--a=1"], ["--resume", "latest", "--a", "1"]),
        (["--resume", "run", "--b", ""], ["--resume", "run", "--b", ""]),
    ],
)
def test_a_flag_may_have_a_value_for_when_none_is_given(argv, expected):
    assert with_bare_value(argv, "resume", "latest") == expected


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (ValueError("k: got 2"), 2, "error: k: got 2\n"),
        (FloatingPointError("the loss is not finite"), 2, "error: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("continue with X"), 130, "continue with X\n"),
    ],
)
def test_a_command_that_fails_prints_one_line_and_returns_its_status(failure, status, said, capsys):
    def command(arguments):
        raise failure

    assert run_command(command, [], stopped="stopped") == status
    assert capsys.readouterr().err == said


def test_a_name_that_the_terminal_cannot_show_stops_no_command(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def command(arguments):
        print("left out caf\udce9.png")
        raise ValueError("image: got é.png")

    assert run_command(command, [], stopped="") == 2
    said = [stream.seek(0) or stream.read() for stream in streams]
    assert said == ["left out caf\\udce9.png\n", "error: image: got \\xe9.png\n"]


def test_a_command_that_ends_well_returns_0_and_gets_its_arguments():
    seen = []
    assert run_command(seen.extend, ["a", "--b"], stopped="") == 0 and seen == ["a", "--b"]


@contextlib.contextmanager
def handlers_kept():
    """Restores the signal handlers that the start of a command replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Arguments that each installed command refuses, and what it says of them.
REFUSED = {
    "train": ([], "data_dir: got ''; expected a folder of images"),
    "prune": ([], "base: got ''; expected --base FILE with the model's flags, or --run DIR"),
    "sample": ([], "no model is named; give either --run DIR or --model_path FILE"),
    "evaluate": ([], "0 sets of images are named; name two of: folder"),
    "serve": ([], "no model is named; give either --run DIR or --model_path FILE"),
    "nll": ([], "no model is named; give either --run DIR or --model_path FILE"),
    "encode": ([], "vae: got ''; expected --vae: the folder of an autoencoder"),
    "latency": ([], "groups: got 0; expected --groups N"),
    "merge": ([], "no experts are named; give either --run DIR or files of weights before the flags"),
    "convert": ([], "no model is named; give either --run DIR or --model_path FILE"),
    "demo": (["--scale", "0"], "scale: got 0.0; expected a number above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_command_is_installed_and_refuses_in_the_same_way(name, capsys, monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[f"tdc-{name}"].partition(":")
    arguments, message = REFUSED[name]
    monkeypatch.setattr(sys, "argv", [f"tdc-{name}", *arguments])
    assert len(scripts) == len(REFUSED)
    with handlers_kept():
        assert getattr(importlib.import_module(module), function)() == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


# What takes the place of torch while a command starts: it loads for ever, and lets no exception out.
SLOW_TORCH = """
import time
print("loading", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        raise ImportError("initialization failed")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", REFUSED)
def test_a_command_that_is_stopped_while_torch_loads_ends_as_at_any_other_time(name, number, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = f"import sys; from tdc_fast.entry import {name}; sys.exit({name}())"  # as the installed one
    process = subprocess.Popen(
        [sys.executable, *(["-m", f"tdc_fast.{name}"] if number == signal.SIGINT else ["-c", script])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == f"{STOPPED[name]}\n"
    assert process.returncode == 130
