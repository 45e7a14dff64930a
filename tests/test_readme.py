"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["model"](names["x"], names["t"]).shape == names["x"].shape
    assert names["model"].expert(0)(names["x"][:1], names["t"][:1]).shape == names["x"][:1].shape


def test_every_option_that_the_readme_names_exists():
    from tdc_fast.runs.config import TrainConfig

    commands = re.findall(r"python -m tdc_fast\.train (.*?)(?=\n    python|\n\n)", README.read_text(), re.S)
    assert commands
    for option in re.findall(r"--(\w+)", " ".join(commands)):
        assert option in TrainConfig.__dataclass_fields__, option
