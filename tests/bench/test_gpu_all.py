"""The command that runs everything that needs a GPU: what fails or hangs does not keep the rest from running."""

from __future__ import annotations

import json
import os
import time
from importlib import import_module
from pathlib import Path

import pytest

from bench import gpu_all
from bench.files import ROOT
from bench.gpu_all import STOPPED, Step, run_all, steps


def python(name: str, *programs: str, seconds: int = 60, result: str = "") -> Step:
    return Step(name, seconds, tuple(("-c", program) for program in programs), result)


def record(out: Path) -> dict[str, list[str]]:
    done = json.loads((out / "steps.json").read_text())
    return {name: [command["ended"] for command in step["commands"]] for name, step in done.items()}


def test_a_step_that_fails_does_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_two = python("two", "print('3 passed')", "import sys; print('1 failed, 2 hangs\\nthe end'); sys.exit(3)")
    assert run_all([of_two, python("after", "open('/dev/null')")], tmp_path, 1000.0) == 1
    assert record(tmp_path) == {"two": ["passed", "exit code 3"], "after": ["passed"]}
    said = capsys.readouterr().out
    assert "\n    1 failed, 2 hangs\n" in said and "\n    3 passed\n" in said
    assert (tmp_path / "two-1.log").read_text() == "1 failed, 2 hangs\nthe end\n"


def test_what_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = (
        "import subprocess, sys, pathlib, time\n"
        "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid)); time.sleep(600)"
    )
    assert run_all([python("hangs", program, seconds=3), python("after", "")], tmp_path, 1000.0) == 1
    assert record(tmp_path) == {"hangs": [STOPPED], "after": ["passed"]}
    until = time.monotonic() + 30
    while alive(int(child.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(child.read_text()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_same_command_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = python("first", f"open({str(tmp_path / 'count')!r}, 'a').write('x')")
    both = [counted, python("long", "", seconds=900)]
    assert run_all(both, tmp_path, 100.0) == 1
    assert "long: waits for the next call" in capsys.readouterr().out
    assert run_all(both, tmp_path, 1000.0) == 0
    assert (tmp_path / "count").read_text() == "x" and record(tmp_path) == {"first": ["passed"], "long": ["passed"]}
    assert run_all(both, tmp_path, 1000.0, only=["first"]) == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_a_step_waits_for_the_file_that_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reads = [python("reads", "", result="made.json")]
    assert run_all(reads, tmp_path, 1000.0) == 1
    assert "made.json is missing" in capsys.readouterr().out
    (tmp_path / "made.json").touch()
    assert run_all(reads, tmp_path, 1000.0) == 0


def test_every_command_is_one_that_exists(tmp_path: Path) -> None:
    commands = [command for step in steps(tmp_path, 2) for command in step.commands]
    tested = {Path(command[-1]).name for command in commands if "--record" in command}
    assert tested == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    parsed = 0
    for _, module, *arguments in commands:
        if module == "tests.gpu.restarting":
            continue
        entry = import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module)
        if hasattr(entry, "parse"):
            entry.parse(arguments)
            parsed += 1
    assert parsed >= 5


def test_without_a_gpu_it_says_so_and_lists_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_all.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert gpu_all.main(["--list", "--out", str(tmp_path)]) == 0
    assert "tests/gpu/test_hopper_units.py" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_all.main(["--only", "nothing"])
    assert "no such step" in capsys.readouterr().err
