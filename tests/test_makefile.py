"""`make help` names every target that a person may call; `make install` warns of packages that cannot be imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def test_make_help_has_a_line_for_every_target() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    described = dict(re.findall(r"^make (\S+) +(\S.*)$", output, re.M))
    assert sorted(described) == sorted(targets.split())


def test_make_n_prints_what_every_target_would_run_and_runs_nothing(tmp_path: Path) -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", f"VENV={tmp_path / 'venv'}", *targets.split()]
    output = subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "-m pytest" in output and not (tmp_path / "venv").exists()


def test_make_install_warns_of_a_package_that_cannot_be_imported_and_goes_on(tmp_path: Path) -> None:
    """In an environment whose Python installs nothing and writes no bytecode, but imports."""
    python, broken = tmp_path / "bin/python", tmp_path / "broken_package.py"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    broken.write_text("raise AttributeError('no attribute of that name')")
    command = ["make", "install", f"VENV={tmp_path}", "BYTECODE=json broken_package tomllib"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment = {**ours, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    (warning,) = result.stderr.splitlines()
    assert "broken_package cannot be imported" in warning and "no attribute of that name" in warning
    assert (tmp_path / ".installed-dev").exists()
