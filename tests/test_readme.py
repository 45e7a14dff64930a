"""What README and the command line's page show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["model"](names["x"], names["t"]).shape == names["x"].shape
    assert names["model"].expert(0)(names["x"][:1], names["t"][:1]).shape == names["x"][:1].shape


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "command_line.md"], ids=lambda path: path.name)
def test_every_option_of_training_that_a_page_names_exists(page):
    from tdc_fast.runs.config import TrainConfig

    text = page.read_text()
    commands = re.findall(r"python -m tdc_fast\.train (.*?)(?=\n    python|\n\n)", text, re.S)
    assert commands
    table = re.findall(r"^\| (`--.*?) \|", text, re.M)  # a row of flags and what they choose
    for option in re.findall(r"--(\w+)", " ".join(commands + table)):
        assert option in TrainConfig.__dataclass_fields__, option
